"""The one door: `twofold COMMAND`. One short function a command; heavy imports wait inside, so `--help` is instant.

A command function is given its `Flags`, declares what it accepts, and returns what to run once they are parsed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .commands.flags import Flags, Given, complain
from .core import ConfigError, TwofoldError, unknown
from .platforms import bound_spin, bound_team

KERNELS = "serve ops by these implementations, e.g. linear=reference,rms_norm=native (twofold kernels lists them)"

Run = Callable[[Given], int]
Command = Callable[[Flags], Run]


def serve(flags: Flags) -> Run:
    """Serve a model over an OpenAI-compatible API, with a chat and a training page ($TWOFOLD_API_KEY: ask for it)."""
    from .engine.config import EngineConfig
    from .serve.config import ServeConfig

    flags.positional(
        "directories", "a checkpoint directory, or several as NAME=DIR (default: the bundled one)", many=True
    )
    flags.add("kernels", KERNELS)
    flags.settings(ServeConfig, skip=["model", "models"])
    flags.settings(EngineConfig)

    def run(given: Given) -> int:
        from .commands.model import served_models
        from .serve.server import serve

        if given.kernels is not None:  # for the model's process, which looks whether there are such
            os.environ["TWOFOLD_KERNELS"] = given.kernels
        key = os.environ.get("TWOFOLD_API_KEY")
        config = given.settings(ServeConfig, **served_models(given.directories), api_keys=(key,) if key else ())
        return serve(config, given.settings(EngineConfig))

    return run


def run_batch(flags: Flags) -> Run:
    """Answer a file of requests, as /v1/batches would, without a server; the same command again goes on."""
    from .engine.config import EngineConfig

    flags.positional("model", "checkpoint directory (default: the bundled model)", required=False)
    flags.add("input", "the requests, a line of JSON each: custom_id, method, url, body", required=True, short="i")
    flags.add("output", "the answers, a line of JSON each, in the order in which they come", required=True, short="o")
    flags.add("served-model-name", "what the lines call the model (default: its directory's name)")
    flags.settings(EngineConfig)

    def run(given: Given) -> int:
        from .commands.model import model_dir
        from .commands.run_batch import run_batch

        model, name = model_dir(given.model), given.served_model_name
        return run_batch(model, name, Path(given.input), Path(given.output), given.settings(EngineConfig))

    return run


def chat(flags: Flags) -> Run:
    """Talk to a model in the terminal, in this process or through a server."""
    from .engine.config import EngineConfig
    from .engine.sampling import SamplingParams

    flags.add("model", "checkpoint directory (default: the bundled model)")
    flags.add("url", "talk to this server instead, e.g. http://127.0.0.1:8000")
    flags.add("api-key", "the server's key, when it asks for one (default: $TWOFOLD_API_KEY)")
    flags.add("system", "what the model is told first")
    flags.settings(SamplingParams, skip=["n", "logprobs", "prompt_logprobs", "logprobs_mode"])
    flags.settings(EngineConfig, skip=["seed"])

    def run(given: Given) -> int:
        from .commands.chat import local, remote, talk

        reply = remote(given) if given.url else local(given)
        return talk(reply, given.system)

    return run


def explain(flags: Flags) -> Run:
    """Say where a request's time went and why it waited, as its server remembers; without an id, list the last."""
    flags.positional("request_id", "as an answer's id or its x-request-id header has it", required=False)
    flags.add("url", "the server (default: http://127.0.0.1:8000)")
    flags.add("api-key", "the key that the request was sent with (default: $TWOFOLD_API_KEY)")
    flags.add("json", "print the facts as the server has them", switch=True)

    def run(given: Given) -> int:
        from .commands.explain import explain

        return explain(given.url or "http://127.0.0.1:8000", given.api_key, given.request_id, as_json=bool(given.json))

    return run


def generate(flags: Flags) -> Run:
    """Continue a prompt and print the text; greedy unless the checkpoint's generation_config.json says otherwise."""
    from .engine.config import EngineConfig
    from .engine.sampling import SamplingParams

    flags.add("model", "checkpoint directory (default: the bundled model)")
    flags.add("prompt", "the text to continue; - reads it from standard input", required=True)
    flags.add("echo", "print the prompt before its continuation", switch=True)
    flags.add("kernels", KERNELS)
    flags.settings(SamplingParams, skip=["logprobs", "prompt_logprobs", "logprobs_mode"])
    flags.settings(EngineConfig, skip=["seed"])

    def run(given: Given) -> int:
        from .commands.generate import generate
        from .kernels.op import use_named

        if given.kernels is not None:
            use_named(given.kernels)
        return generate(given)

    return run


def quantize(flags: Flags) -> Run:
    """Round a model's weights to int8, int4 or fp8, calibrated on text, and say what it costs."""
    from .quant.config import Reading, Recipe

    flags.positional("model", "directory of a float checkpoint (default: the bundled model)", required=False)
    flags.add("output", "directory to write the quantized checkpoint to", required=True)
    flags.add("symmetric", "one zero for all codes (the default; --asymmetric gives each scale its own)", switch=True)
    flags.settings(Recipe)
    flags.settings(Reading)

    def run(given: Given) -> int:
        from .commands.model import model_dir
        from .commands.quantize import quantize

        recipe = given.settings(Recipe)
        if given.symmetric and recipe.asymmetric:
            raise ConfigError("--symmetric and --asymmetric exclude each other: give one")
        return quantize(model_dir(given.model), Path(given.output), recipe, given.settings(Reading))

    return run


def train(flags: Flags) -> Run:
    """Train or fine-tune a model as a recipe says; the same command again resumes."""
    flags.positional("recipe", "a recipe, such as recipes/pybot/pretrain.toml")
    flags.add("set", "change one key of the recipe: --set optimizer.lr=3e-4", many=True)
    flags.add("fresh", "start over: remove the run's checkpoints and log first", switch=True)
    flags.add("profile", "after six steps, say where work, time and memory go, module by module", switch=True)
    flags.add("profile-comm", "after five steps, say what each collective costs", switch=True)
    flags.add("plan", "start nothing: say what a rank would hold and send, how long it takes, what fits", switch=True)
    flags.add("ranks", "with --plan: so many processes (default: 1)")
    flags.add("node", "with --plan: so many of them on each machine (default: all)")
    flags.add("kernels", KERNELS)

    def run(given: Given) -> int:
        from .commands.train import train
        from .kernels.op import use_named

        if given.plan or given.ranks or given.node:
            from .commands.train_plan import planned

            return planned(given.recipe, given.set or [], given.plan, given.ranks, given.node)
        if given.kernels is not None:
            use_named(given.kernels)
        asked = {"modules": given.profile, "collectives": given.profile_comm}
        return train(given.recipe, given.set or [], given.fresh, [name for name, on in asked.items() if on])

    return run


def align(flags: Flags) -> Run:
    """Fine-tune, reward, prefer or reinforce a model as a recipe says: SFT, reward models, DPO, PPO, GRPO."""
    flags.positional("recipe", "a recipe, such as recipes/pybot/grpo.toml")
    flags.rest("flags", "any key of the recipe as a flag, such as --steps 3 --output DIR --optimizer.lr 1e-5; --fresh")

    def run(given: Given) -> int:
        from .commands.align import align

        return align(given.recipe, given.flags)

    return run


def evaluate(flags: Flags) -> Run:
    """Measure a model or a running server on a task file: pass rates and rewards, with their intervals."""
    from .align.task import Task
    from .engine.config import EngineConfig

    flags.positional(
        "model", "a model's directory, a finished run's, or http://host:port/v1 (default: the bundled one)"
    )
    flags.positional("task", "a task file, such as recipes/pybot/tasks/tests.toml", required=False)
    flags.add("against", "compare with this model or server, prompt by prompt")
    flags.add("limit", "ask the first so many prompts alone")
    flags.add("output", "write every figure to this JSON file")
    flags.add("answers", "write every answer and what it was worth to this JSONL file")
    flags.add("record", "keep the figures beside the model, for its card and the training page", switch=True)
    flags.add("served-model", "which of a server's models to ask (default: the first)")
    flags.add("api-key", "the server's key, when it asks for one (default: $TWOFOLD_API_KEY)")
    flags.settings(Task, skip=["rewards"])
    flags.settings(EngineConfig, skip=["seed"])

    def run(given: Given) -> int:
        from .commands.evaluate import run

        return run(given)

    return run


def checkpoint(flags: Flags) -> Run:
    """Verify or list the checkpoints of a training run, or export one as a plain model."""
    flags.positional("action", "verify, list or export", choices=["verify", "list", "export"])
    flags.positional("directory", "a run's directory, or one of its checkpoints")
    flags.add("output", "export: the directory to write the model to")
    flags.add("dtype", "export: fp32, bf16 or fp16 (default: as the checkpoint's weights are)")

    def run(given: Given) -> int:
        from .commands.checkpoint import checkpoint

        return checkpoint(given.action, Path(given.directory), given.output, given.dtype)

    return run


def launch(flags: Flags) -> Run:
    """Print the file that starts a run on many machines: Slurm, Kubernetes, or ssh from a hostfile."""
    from .parallel.launching import LaunchConfig

    kinds = ("slurm", "k8s", "hostfile")
    flags.positional("kind", f"one of {', '.join(kinds)}", choices=kinds)
    flags.positional("recipe", "a recipe, such as recipes/pybot/pretrain.toml")
    flags.add("set", "change one key of the recipe: --set optimizer.lr=3e-4", many=True)
    flags.add("hostfile", "machines, a line 'host slots=4' each")
    flags.settings(LaunchConfig)

    def run(given: Given) -> int:
        from .commands.launch import launch

        return launch(given.kind, given.recipe, given.set or [], given.settings(LaunchConfig), given.hostfile)

    return run


def bench(flags: Flags) -> Run:
    """Measure throughput, latency or this machine's limits; further flags go to the benchmark."""
    from .commands.bench import BENCHMARKS

    flags.positional("benchmark", f"one of {', '.join(BENCHMARKS)}", choices=BENCHMARKS)
    flags.rest("flags", "the benchmark's own flags; twofold bench throughput --help lists them")

    def run(given: Given) -> int:
        from .commands.bench import bench

        return bench(given.benchmark, given.flags)

    return run


def plan(flags: Flags) -> Run:
    """Say what a model needs and what fits this machine, before anything is loaded."""
    from .engine.config import EngineConfig

    flags.positional("model", "checkpoint directory (default: the bundled model)", required=False)
    flags.settings(EngineConfig)

    def run(given: Given) -> int:
        from .commands.model import model_dir
        from .commands.plan import plan

        return plan(model_dir(given.model), given.settings(EngineConfig))

    return run


def doctor(flags: Flags) -> Run:
    """Say what this machine offers, what is missing, and what that costs."""

    def run(given: Given) -> int:
        from .commands.doctor import doctor

        return doctor()

    return run


def kernels(flags: Flags) -> Run:
    """List every op, which implementation serves it here, why, and how fast it is."""
    flags.add("no-measure", "leave out the speeds", switch=True)

    def run(given: Given) -> int:
        from .commands.kernels import kernels

        return kernels(measure=not given.no_measure)

    return run


COMMANDS: dict[str, Command] = {
    f.__name__.replace("_", "-"): f
    for f in (
        serve,
        run_batch,
        chat,
        explain,
        generate,
        quantize,
        train,
        align,
        evaluate,
        checkpoint,
        launch,
        bench,
        plan,
        doctor,
        kernels,
    )
}


def summary(command: Command) -> str:
    """The first line of a command's docstring."""
    return (command.__doc__ or "").strip().splitlines()[0]


def overview() -> str:
    lines = [f"  {name:<12}{summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"Twofold {__version__} trains, aligns and serves large language models.",
            "",
            "usage: twofold COMMAND [FLAGS]",
            "",
            *lines,
            "",
            "twofold COMMAND --help shows the flags of one command.",
        ]
    )


def run(argv: list[str]) -> int:
    """Dispatch one command line; raises TwofoldError for what the user can fix."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, *rest = argv
    if name in ("-V", "--version"):
        print(f"twofold {__version__}")
        return 0
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        raise ConfigError(unknown(kind, name, ["--help", "--version"] if kind == "flag" else COMMANDS))
    flags = Flags(name, summary(COMMANDS[name]))
    work = COMMANDS[name](flags)
    return work(flags.parse(rest))


def main(argv: list[str] | None = None) -> int:
    """The entry point: exit code 0, 2 for what the user can fix (told in one line), 130 for Ctrl-C."""
    bound_spin()
    bound_team()
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except TwofoldError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
