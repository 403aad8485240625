"""Keys: every key of DeepSpeed's ds_config (0.19), and what becomes of each here. One table, free of torch.

mapped    it does here what it does there; the words say by what
nothing   it may be given, and changes nothing here; the words say why
refused   an error that says what to use instead, unless it is at DeepSpeed's default or its block is not enabled

A key's value in the table is its default; a type stands for "none, or of this type", a tuple for the choices (the first
is the default), `Any` for whatever its block's own rules say. A row's `where` is the block that its keys are in.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

Answer = Literal["mapped", "nothing", "refused"]


@dataclass(frozen=True, slots=True)
class Row:
    """Keys of one block that have one answer."""

    answer: Answer
    where: str
    words: str
    keys: dict[str, Any]


def mapped(where: str, words: str, **keys: Any) -> Row:
    return Row("mapped", where, words, keys)


def nothing(where: str, words: str, **keys: Any) -> Row:
    return Row("nothing", where, words, keys)


def refused(where: str, words: str, **keys: Any) -> Row:
    return Row("refused", where, words, keys)


Z, F, B, A = "zero_optimization", "fp16", "bf16", "activation_checkpointing"
P, S = "optimizer.params", "scheduler.params"
OO, OP = f"{Z}.offload_optimizer", f"{Z}.offload_param"
_PRUNE = "this module trains as it is: prune or quantize afterwards (`twofold quantize`)"
_CURRICULUM = "order the training_data itself, or use the data of a recipe (`twofold train`)"
_RECIPE = "a module is divided over data-parallel ranks alone: a recipe (`twofold train`) divides a decoder by parallel"
_PROFILE = "count with torch.utils.flop_counter around engine(...), or train a recipe with --profile"
_BUCKETS = "FSDP2 gathers and reduces one block of the module at a time, and has no buckets"
_FETCH = "FSDP2 gathers block by block, in the order of the forward pass: nothing is traced or tuned"
_MEASURE = "time a few steps of each setting in a loop over initialize"
_ENGINE = "DeepSpeed's engine alone has it; torch.compile the module before initialize"

TABLE: tuple[Row, ...] = (
    # ------------------------------------------------------------------------------------- the step
    mapped("", "sequences of a step, of a micro-batch on a rank, micro-batches of a step: any two give the third",
           train_batch_size=int, train_micro_batch_size_per_gpu=int, gradient_accumulation_steps=int),
    mapped("", "false: `set_gradient_accumulation_boundary` says where a step ends",
           managed_gradient_accumulation=True),
    mapped("", "the largest global norm of the gradient; 0: it is not clipped", gradient_clipping=1.0),
    mapped("", "gradients averaged over ranks, or added up", gradient_allreduce_op=("mean", "sum")),
    mapped("", "a line every so many steps", steps_per_print=int),
    mapped("", "milliseconds of forward, backward and step on that line", wall_clock_breakdown=False),
    mapped("", "whether the loader leaves a last short batch out", dataloader_drop_last=False),
    mapped("", "an optimizer that is not elementwise may be handed in; on its rank's slices it is another rule",
           zero_allow_untested_optimizer=False),
    nothing("", "gradients are added up in fp32, which does not overflow and needs no scaling before",
            prescale_gradients=False, gradient_predivide_factor=1.0),
    nothing("", "memory and settings are told by `twofold doctor` and by the notes of initialize",
            memory_breakdown=False, dump_state=False, log_level=str, vocabulary_size=int),
    nothing("", "FSDP2 gathers in one way", disable_allgather=False),
    nothing("", "Twofold's optimizers run wherever the shards are", zero_force_ds_cpu_optimizer=True),
    nothing("", "collecting garbage costs no collective here", disable_python_gc=False),
    nothing("", "no experts are divided here", use_data_before_expert_parallelism=False),
    refused("", "gradients are added up in fp32: leave it out; to send less, set zero_quantized_weights and "
            "zero_quantized_gradients", communication_data_type=("fp32", "fp16", "bf16", "fp8")),
    refused("", "ZeRO's gradients are dense: leave it out",
            sparse_gradients=False),
    refused("", "torch.cuda.graph around the step", graph_harvesting=False),
    refused("", _RECIPE + ".sp", sequence_parallel_size=1, data_parallel_size=int,
            seq_parallel_communication_data_type=("fp32", "fp16", "bf16")),
    nothing("data_types", "gradients are added up, and masters kept, in fp32", grad_accum_dtype=(None, "fp32")),
    refused("data_types", "fp16 or bf16 say what weights are multiplied in; buffers stay as the module has them",
            param_dtype=(None, "fp32"), buffer_dtype=(None, "fp32")),
    # ------------------------------------------------------------------------------------- optimizer, scheduler
    mapped("optimizer", "a rule of Twofold over fp32 shards: Adam (AdamW unless adam_w_mode is false), AdamW, Lamb, "
           "Lion, Adagrad, SGD, Muon; hand any other in as initialize(optimizer=...)", type=str),
    nothing("optimizer", "all rules are fused", legacy_fusion=False),
    mapped(P, "the rule's numbers; a rule refuses those of another", lr=1e-3, betas=Any, eps=Any, weight_decay=0.0,
           momentum=Any, nesterov=Any, max_coeff=10.0, min_coeff=0.01, muon_lr=float, adam_lr=float),
    mapped(P, "false: Adam's weight decay is part of the gradient", adam_w_mode=True),
    nothing(P, "there is one implementation, fused", torch_adam=False, fused=True, foreach=True,
            fp32_optimizer_states=True, set_grad_none=True),
    refused(P, "all rules correct the bias: leave it out or true", bias_correction=True),
    refused(P, "hand torch.optim.AdamW(amsgrad=True) in as initialize(optimizer=...)", amsgrad=False),
    refused(P, "set gradient_clipping", max_grad_norm=0.0),
    refused(P, "1-bit optimizers are gone from DeepSpeed: ZeRO with zero_quantized_gradients sends a quarter",
            cuda_aware=False, freeze_step=int, comm_backend_name=str, var_freeze_step=int, var_update_scaler=int,
            local_step_scaler=int, local_step_clipper=int, coeff_beta=float, factor_max=float, factor_min=float,
            factor_threshold=float),
    refused(P, "Muon turns whole matrices by five steps of Newton and Schulz", ns_method=Any, per_head_muon=False),
    refused(P, "the rule of You et al. has the root outside and epsilon beside it", eps_inside_sqrt=False,
            max_iter=Any),
    mapped("scheduler", "DeepSpeed's formulas: LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR",
           type=str),
    mapped(S, "LRRangeTest", lr_range_test_min_lr=1e-3, lr_range_test_step_size=2000, lr_range_test_step_rate=1.0,
           lr_range_test_staircase=False),
    mapped(S, "OneCycle", cycle_min_lr=float, cycle_max_lr=float, decay_lr_rate=0.0, cycle_first_step_size=2000,
           cycle_second_step_size=int, cycle_first_stair_count=0, cycle_second_stair_count=int, decay_step_size=0,
           cycle_momentum=True, cycle_min_mom=0.8, cycle_max_mom=0.9, decay_mom_rate=0.0),
    mapped(S, "WarmupLR, WarmupDecayLR, WarmupCosineLR", warmup_min_lr=0.0, warmup_max_lr=float, warmup_num_steps=1000,
           warmup_type=("log", "linear"), total_num_steps=int, warmup_min_ratio=0.0, cos_min_ratio=0.0001),
    mapped(S, "the step that the schedule goes on from", last_batch_iteration=-1),
    # ------------------------------------------------------------------------------------- precision
    mapped(F, "fp16 weights in use, fp32 masters, DeepSpeed's loss scaling", enabled=False, loss_scale=0.0,
           initial_scale_power=16, loss_scale_window=1000, hysteresis=2, consecutive_hysteresis=False,
           min_loss_scale=1.0),
    mapped(F, "floating inputs of forward become fp16", auto_cast=False),
    refused(F, "masters and sums of gradients are fp32", fp16_master_weights_and_grads=False),
    mapped(B, "bf16 weights in use, fp32 masters", enabled=False),
    nothing(B, "gradients are added up in fp32 as each micro-batch ends", immediate_grad_update=False),
    refused(B, "a gradient that is not finite never changes weights: leave it out", check_grad_overflow=True),
    refused(B, "masters, sums of gradients and states are fp32", bf16_master_weights_and_grads=False,
            bf16_optimizer_states=False),
    mapped("torch_autocast", "forward runs under torch.autocast, weights stay fp32", enabled=False,
           dtype=("bfloat16", "float16")),
    refused("torch_autocast", "torch's own lists decide what runs narrow", lower_precision_safe_modules=list),
    refused("amp", "set bf16 or fp16", enabled=False, opt_level=str, loss_scale=Any, keep_batchnorm_fp32=Any,
            master_weights=Any, cast_model_type=Any, patch_torch_functions=Any, min_loss_scale=Any, max_loss_scale=Any,
            cast_model_outputs=Any, verbosity=Any, num_losses=Any),
    # ------------------------------------------------------------------------------------- ZeRO
    mapped(Z, "what ranks share, by FSDP2: nothing, states, gradients too, parameters too", stage=0),
    mapped(Z, "more than 1: parameters are divided among so many ranks of a node, with a copy on each node",
           zero_hpz_partition_size=1, mics_shard_size=-1),
    mapped(Z, "both true: what is gathered and reduced travels as int8 blocks", zero_quantized_weights=False,
           zero_quantized_gradients=False),
    nothing(Z, _BUCKETS, contiguous_gradients=True, reduce_scatter=True, reduce_bucket_size=5e8,
            use_multi_rank_bucket_allreduce=True, allgather_partitions=True, allgather_bucket_size=5e8,
            round_robin_gradients=False, legacy_stage1=False, parameter_alignment=Any,
            stage3_partition_stream_chunk_size=0),
    nothing(Z, "on CUDA it always does, on a CPU it cannot", overlap_comm=bool),
    nothing(Z, _FETCH, stage3_prefetch_bucket_size=5e7, prefetch_bucket_size=5e7,
            stage3_param_persistence_threshold=1e5, param_persistence_threshold=1e5,
            stage3_model_persistence_threshold=sys.maxsize, model_persistence_threshold=sys.maxsize,
            stage3_max_live_parameters=1e9, max_live_parameters=1e9, stage3_max_reuse_distance=1e9,
            max_reuse_distance=1e9, stage3_module_granularity_threshold=0, module_granularity_threshold=0,
            stage3_use_all_reduce_for_fetch_params=False, use_all_reduce_for_fetch_params=False,
            stage3_allgather_sequential=False, log_trace_cache_warnings=False, enable_sanity_checks=False,
            memory_efficient_linear=True, override_module_apply=True, sub_group_size=1e9,
            mics_hierarchical_params_gather=False),
    nothing(Z, "every checkpoint holds the weights whole, in fp32", stage3_gather_16bit_weights_on_model_save=False,
            stage3_gather_fp16_weights_on_model_save=False, gather_16bit_weights_on_model_save=False,
            load_from_fp32_weights=True, elastic_checkpoint=False, pipeline_loading_checkpoint=False),
    nothing(Z, "a parameter that was not used has no gradient and is left alone", ignore_unused_parameters=True),
    nothing(Z, "the norm is taken in the pass that clips", compute_grad_norm=True),
    nothing(Z, "Muon's states are where all are", save_muon_momentum_buffer_in_memory=False),
    nothing(f"{Z}.leaf_module", "blocks are gathered whole: every child of a module list is a leaf", classes=list,
            names=list, name_suffixes=list),
    refused(Z, "quantize what is not trained before initialize (`twofold quantize`)",
            zero_quantized_nontrainable_weights=False),
    refused(Z, "int8 blocks lose little: zero_quantized_gradients, or a recipe's parallel.comm = 'onebit', which "
            "keeps what was lost for the next step", zeropp_loco_param=dict),
    refused(Z, "use offload_optimizer and offload_param", cpu_offload=False, cpu_offload_param=False,
            cpu_offload_use_pin_memory=False),
    mapped(OO, "where the optimizer's states are: the device, the host's memory, files (`train/offload.py`)",
           device=("none", "cpu", "nvme")),
    mapped(OO, "a directory on a fast disk, and the tiles that are in memory at once", nvme_path=str, buffer_count=4),
    mapped(OP, "none; cpu, where the machine has no accelerator and all is there anyway",
           device=("none", "cpu", "nvme")),
    nothing(OO, "all states are where device says, read ahead and written behind; host memory is pinned where it helps",
            pin_memory=True, pipeline_read=False, pipeline_write=False, pipeline=False, fast_init=False, ratio=1.0,
            super_offload=False, cpuadam_cores_perc=0.8),
    nothing(OP, "nothing is moved", nvme_path=str, buffer_count=5, buffer_size=1e8, max_in_cpu=1e9, pin_memory=True),
    refused(f"{Z}.zenflow", "the whole gradient moves the weights at every step: leave zenflow out", topk_ratio=0.1,
            select_strategy="auto", select_interval=Any, update_interval=Any, overlap_step=False, offload=False,
            auto_ratio=0.99, full_warm_up_rounds=0, steps_per_epoch=int, pt_reserved_cores_perc=0.5),
    nothing("aio", "files are mapped and read by the system's own read-ahead", block_size=1048576, queue_depth=8,
            intra_op_parallelism=1, thread_count=1, single_submit=False, overlap_events=True, use_gds=False),
    # ------------------------------------------------------------------------------------- activations
    mapped(A, "what autograd keeps waits in host memory", cpu_checkpointing=False),
    nothing(A, "the module says what it recomputes (torch.utils.checkpoint, gradient_checkpointing_enable()); with "
            "one rank of model parallelism there is nothing to partition", partition_activations=False, profile=False,
            contiguous_memory_optimization=False, number_checkpoints=int, synchronize_checkpoint_boundary=False),
    # ------------------------------------------------------------------------------------- other axes
    refused("pipeline", _RECIPE + ".pp", stages=Any, partition=Any, seed_layers=False,
            activation_checkpoint_interval=0, pipe_partitioned=True, grad_partitioned=True, use_reentrant=True),
    refused("tensor_parallel", _RECIPE + ".tp", autotp_size=0, dtype=Any, tp=dict, tp_overlap_comm=False,
            vocab_parallel_lm_head=False, partition_config=Any, preset_model=Any, injection_policy_tuple=Any,
            tp_grain_size=1, keep_module_on_host=False),
    refused("expert_parallel", _RECIPE + ".ep", enabled=False, autoep_size=Any, ep_size=Any, expert_config=Any,
            preset_model=Any, use_grouped_mm=Any, moe_layer_pattern=Any),
    # ------------------------------------------------------------------------------------- checkpoints
    mapped("checkpoint", "whether ranks that name different tags are told of, or an error",
           tag_validation=("Warn", "Ignore", "Fail", "WARN", "IGNORE", "FAIL")),
    nothing("checkpoint", "a checkpoint is read at any number of ranks as it is", load_universal=False),
    nothing("checkpoint", "each rank writes its own file of states", parallel_write=dict, writer=dict,
            checkpoint_serialization=True),
    refused("checkpoint", "all ranks read and write one directory: put it where all see it",
            use_node_local_storage=False),
    nothing("datastates_ckpt", "there is no such cache", host_cache_size=int),
    refused("nebula", "checkpoints are hashed, renamed into place and read at any number of ranks: leave it out",
            enabled=False, persistent_storage_path=str, persistent_time_interval=int, num_of_version_in_retention=int,
            enable_nebula_load=True, load_path=str),
    # ------------------------------------------------------------------------------------- what is told
    mapped("tensorboard", "loss, rate and scale of every step as TensorBoard's events", enabled=False, output_path="",
           job_name="DeepSpeedJobName"),
    mapped("csv_monitor", "the same, one CSV file each", enabled=False, output_path="", job_name="DeepSpeedJobName"),
    refused("wandb", "use tensorboard or csv_monitor, which reach no other machine", enabled=False, group=str,
            team=str, project=str),
    refused("comet", "use tensorboard or csv_monitor, which reach no other machine", enabled=False,
            samples_log_interval=100, project=str, workspace=str, api_key=str, experiment_name=str, experiment_key=str,
            online=bool, mode=str),
    refused("flops_profiler", _PROFILE, enabled=False, profile_step=1, module_depth=-1, top_modules=1, detailed=True,
            output_file=str, recompute_fwd_factor=0.0),
    refused("comms_logger", "wrap a step in torch.distributed.tensor.debug.CommDebugMode", enabled=False,
            verbose=False, prof_all=True, debug=False, prof_ops=list),
    # ------------------------------------------------------------------------------------- data
    refused("data_efficiency", _CURRICULUM, enabled=False, seed=1234, data_sampling=dict, data_routing=dict),
    refused("curriculum_learning", _CURRICULUM, enabled=False, curriculum_type=str, min_difficulty=int,
            max_difficulty=int, schedule_type=str, schedule_config=dict),
    # ------------------------------------------------------------------------------------- what else there was
    refused("elasticity", "a checkpoint is read at any number of ranks: start torchrun --nnodes MIN:MAX and set "
            "train_batch_size, micro-batches follow", enabled=False, max_train_batch_size=2000, micro_batch_sizes=list,
            min_gpus=1, max_gpus=10000, num_gpus_per_node=1, model_parallel_size=1, min_time=0,
            prefer_larger_batch=True, ignore_non_elastic_batch_info=False, version=0.2),
    refused("sparse_attention", "a recipe's layers take layouts (docs/train.md); a module brings its own attention",
            mode=str, block=16, different_layout_per_head=False, num_local_blocks=4, num_global_blocks=1,
            attention="bidirectional", horizontal_global_attention=False, num_different_global_patterns=1,
            num_random_blocks=0, local_window_blocks=list, global_block_indices=list, global_block_end_indices=list,
            num_sliding_window_blocks=3),
    refused("progressive_layer_drop", "write the drop into the module's forward", enabled=False, theta=1.0,
            gamma=0.001),
    refused("eigenvalue", "torch.func gives Hessian products of any module", enabled=False, verbose=False,
            max_iter=100, tol=1e-2, stability=1e-6, gas_boundary_resolution=1, layer_name=str, layer_num=0),
    refused("compression_training", _PRUNE, weight_quantization=dict, activation_quantization=dict,
            sparse_pruning=dict, row_pruning=dict, head_pruning=dict, channel_pruning=dict, layer_reduction=dict),
    refused("quantize_training", _PRUNE, enabled=False, quantize_verbose=False, quantizer_kernel=False,
            quantize_bits=dict, quantize_schedule=dict, quantize_groups=1, fp16_mixed_quantize=dict, quantize_type=str,
            rounding=str, quantize_algo=dict, schedule_type=str),
    refused("weight_quantization", _PRUNE, shared_parameters=dict, different_groups=dict,
            quantized_initialization=dict, post_init_quant=dict),
    refused("autotuning", _MEASURE, enabled=False, fast=True, metric="throughput", results_dir=str,
            exps_dir=str, overwrite=True, start_profile_step=3, end_profile_step=5, tuner_type="gridsearch",
            tuner_early_stopping=5, tuner_num_trials=50, max_train_batch_size=int, min_train_batch_size=1,
            max_train_micro_batch_size_per_gpu=1024, min_train_micro_batch_size_per_gpu=1,
            num_tuning_micro_batch_sizes=3, mp_size=1, arg_mappings=dict, model_info=dict, model_info_path=str),
    refused("hybrid_engine", "twofold.LLM generates from the weights that were saved", enabled=False,
            max_out_tokens=512, inference_tp_size=1, release_inference_cache=False, pin_parameters=True,
            tp_gather_partition_size=8, enable_cuda_graph=False),
    refused("compile", _ENGINE, deepcompile=False, free_activation=False, free_activation_threshold=10485760,
            offload_activation=False, offload_opt_states=False, offload_parameters=False, double_buffer=True,
            symmetric_memory=False, passes=list, debug_log=False, sync_before_reduce=False, sync_after_reduce=False,
            sync_before_allgather=False, sync_after_allgather=False, keep_int_input_tensors=True,
            keep_all_input_tensors=False),
)  # fmt: skip


def rows() -> dict[str, tuple[Row, Any]]:
    """Each key by its full path, with its row and what the table says of its value."""
    found = {}
    for row in TABLE:
        for key, value in row.keys.items():
            found[f"{row.where}.{key}" if row.where else key] = (row, value)
    return found


def default(value: Any) -> Any:
    """What a key is when it is not given."""
    if isinstance(value, tuple):
        return value[0]
    return None if isinstance(value, type) or value is Any else value
