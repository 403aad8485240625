"""Batches become weights.

config.py      the recipe: one frozen dataclass a table
build.py       recipe to model, optimizer and data, and the order in which they are put together
adapters.py    LoRA: adapters on a base that stays, and both as one at the end
draft_head.py  heads that guess for a model that stays
draft_config.py  their settings
init.py        the first weights: each tensor a function of the seed and its name
trainer.py     the loop: step, validate, sample, save; stopping and going on
lesson.py      what one step of a run is made of
objective.py   what a step makes smaller, whatever its batch is cut into
step.py        what a step did, and how fast steps are
loss.py        cross-entropy in chunks of rows, forward and backward in one pass
axes.py        what tensor, sequence and pipeline parallel change about a step
pipeline.py    stages of layers on the schedules of torch
share.py       how a step's batch is divided among ranks, in micro-batches
deepspeed/     a ds_config and any nn.Module in, an engine with DeepSpeed's verbs out
replicas.py    gradients added up while backward goes on (ZeRO stage 0)
zero.py        parameters, gradients and states divided among ranks, on FSDP2
offload.py     where optimizer states, gradients and weights are while nobody works on them
offload_config.py     its settings
offload_gradients.py  gradients that leave as soon as they are there
offload_weights.py    weights that come when their layer is run
optimizer.py   fp32 masters and what a rule keeps of them: collect, clip, step, zero
moe.py         a decoder's mixtures while they train: the recipe's rules, put in force for a step
moe_config.py  the table of those rules
routing.py     the rules themselves: noise, capacity, balance
recompute.py   keep a layer's input alone, and run it again for its gradient
rules.py       AdamW, Adam, SGD, Lion, LAMB, Adagrad, Muon
peers.py       the ranks that hold the other slices of a tensor, for rules that must see it whole
scaler.py      loss scaling for fp16, by DeepSpeed's rule
fault.py       which module a number stopped being finite in
policies.py    what of a layer is kept for its backward pass: the words of a recipe
selective.py   tensors that an op made in one pass, kept as recipes
kept.py        where activations wait: the device, host memory, a file
held.py        how much a layer holds between its passes, a forecast from its spec
forecast.py    bytes of a rank at each moment of a step, from shapes alone
traffic.py     bytes that a rank sends in a step, by axis
planning.py    a recipe on so many ranks: layout, bytes, traffic, what would make it fit; zero = "auto"
storages.py    bytes of all tensors that are alive, gathered and let-go ones too, op by op
live.py        bytes of all tensors that are alive, and who made them
profile.py     FLOPs, time and memory of each module of a step
profile_tree.py  a profile as a tree of modules, and as a table
collectives.py bytes, calls and time of what is said to other ranks in a step
meter.py       the share of the machine's matmul peak that a model reaches, and memory
schedule.py    the learning rate as a pure function of the step
checkpoint.py  directories that are whole or not there: hashed, renamed into place, the damaged ones named
pieces.py      what a rank holds of a tensor, written by any layout and read by any other
places.py      where each tensor of a rank lies in the whole model
state.py       what of a run goes into its checkpoints, and back
export.py      a run's weights as a model that others read
files.py       the model's own files, as Hugging Face lays them out
card.py        the model card: a README.md made of the JSON that stands beside it
courier.py     weights on their way from the ranks that hold them to those that write them
saver.py       checkpoints written behind the run's back
journal.py     what happened, as JSON lines and as TensorBoard events
tfevents.py    TensorBoard's file format, written by hand
plot.py        a loss curve for the terminal and as SVG
progress.py    the line that moves while a run does
elastic.py     ElasticConfig; how each number of ranks divides the same batch
heartbeat.py   steps that take too long: everyone's stack in one report, then an end that torchrun starts again
spikes.py      losses far above those before them
rewind.py      back to a checkpoint, and past the batches since
stop.py        stopping by signal: once after the step, twice at once
launch.py      `run`: a recipe file in, an exit status out
"""

from .config import Recipe
from .launch import run
from .trainer import Sampler, Trainer

__all__ = ["Recipe", "Sampler", "Trainer", "run"]
