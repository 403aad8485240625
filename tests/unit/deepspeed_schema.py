"""The keys of DeepSpeed 0.19's ds_config, block by block, as its own sources have them."""

SCHEMA = {
    "": """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
        steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_allgather communication_data_type
        seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
        sparse_gradients gradient_clipping graph_harvesting vocabulary_size dataloader_drop_last
        use_data_before_expert_parallelism zero_allow_untested_optimizer zero_force_ds_cpu_optimizer log_level
        sequence_parallel_size disable_python_gc""",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype",
    "optimizer": "type legacy_fusion",
    "optimizer.params": """lr betas eps weight_decay bias_correction adam_w_mode torch_adam amsgrad max_grad_norm
        momentum nesterov max_coeff min_coeff muon_lr adam_lr freeze_step""",
    "scheduler": "type",
    "scheduler.params": """lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase
        cycle_min_lr cycle_max_lr decay_lr_rate cycle_first_step_size cycle_second_step_size cycle_first_stair_count
        cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom decay_mom_rate warmup_min_lr
        warmup_max_lr warmup_num_steps warmup_type total_num_steps warmup_min_ratio cos_min_ratio
        last_batch_iteration""",
    "fp16": """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads""",
    "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
    "amp": "enabled opt_level",
    "activation_checkpointing": """partition_activations cpu_checkpointing contiguous_memory_optimization
        number_checkpoints synchronize_checkpoint_boundary profile""",
    "pipeline": """stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned""",
    "tensor_parallel": "autotp_size dtype tp tp_overlap_comm vocab_parallel_lm_head partition_config preset_model",
    "expert_parallel": "enabled",
    "elasticity": """enabled max_train_batch_size micro_batch_sizes min_gpus max_gpus num_gpus_per_node
        model_parallel_size min_time prefer_larger_batch ignore_non_elastic_batch_info version""",
    "sparse_attention": """mode block different_layout_per_head num_local_blocks num_global_blocks attention
        horizontal_global_attention num_different_global_patterns num_random_blocks local_window_blocks
        global_block_indices global_block_end_indices num_sliding_window_blocks""",
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    "checkpoint": """tag_validation load_universal use_node_local_storage parallel_write checkpoint_serialization
        writer""",
    "datastates_ckpt": "host_cache_size",
    "data_efficiency": "enabled seed data_sampling data_routing",
    "curriculum_learning": "enabled",
    "progressive_layer_drop": "enabled theta gamma",
    "eigenvalue": "enabled max_iter tol stability gas_boundary_resolution",
    "compression_training": "weight_quantization activation_quantization sparse_pruning row_pruning head_pruning",
    "quantize_training": "enabled",
    "weight_quantization": "shared_parameters different_groups",
    "flops_profiler": "enabled profile_step module_depth top_modules detailed output_file recompute_fwd_factor",
    "comms_logger": "enabled verbose prof_all debug prof_ops",
    "tensorboard": "enabled output_path job_name",
    "wandb": "enabled group team project",
    "csv_monitor": "enabled output_path job_name",
    "comet": "enabled project workspace",
    "autotuning": """enabled fast metric results_dir exps_dir overwrite start_profile_step end_profile_step tuner_type
        tuner_early_stopping tuner_num_trials max_train_batch_size num_tuning_micro_batch_sizes mp_size arg_mappings""",
    "hybrid_engine": """enabled max_out_tokens inference_tp_size release_inference_cache pin_parameters
        tp_gather_partition_size enable_cuda_graph""",
    "compile": """deepcompile free_activation offload_activation offload_opt_states offload_parameters double_buffer
        symmetric_memory passes debug_log sync_before_reduce sync_after_reduce sync_before_allgather
        sync_after_allgather""",
    "nebula": "enabled persistent_storage_path persistent_time_interval num_of_version_in_retention load_path",
    "zero_optimization": """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm load_from_fp32_weights elastic_checkpoint
        sub_group_size cpu_offload cpu_offload_param cpu_offload_use_pin_memory stage3_prefetch_bucket_size
        stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
        stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
        stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
        stage3_partition_stream_chunk_size ignore_unused_parameters legacy_stage1 round_robin_gradients
        zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
        zeropp_loco_param mics_shard_size mics_hierarchical_params_gather memory_efficient_linear
        pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
        save_muon_momentum_buffer_in_memory compute_grad_norm parameter_alignment""",
    "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
    "zero_optimization.offload_optimizer": """device nvme_path buffer_count pin_memory pipeline_read pipeline_write
        fast_init ratio super_offload cpuadam_cores_perc""",
    "zero_optimization.leaf_module": "classes names name_suffixes",
    "zero_optimization.zenflow": """topk_ratio select_strategy select_interval update_interval overlap_step offload
        auto_ratio full_warm_up_rounds pt_reserved_cores_perc""",
}

PATHS = [f"{block}.{key}".strip(".") for block, keys in SCHEMA.items() for key in keys.split()]
