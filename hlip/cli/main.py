"""Parses arguments and hands over to one function per command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import logging
import os
import sys

DESCRIPTION = """\
HLIP: a vision-language model on whole CT and MRI studies.

A study is one visit of one patient: a folder with DICOM series or NIfTI files, as many scans as there are, each with its own
number of slices. Nothing has to be curated, padded or resampled beforehand."""

DETAILS = """\
examples:
  hlip info  patient-17/                       what is in this study, and what the model would see of it
  hlip demo                                    train on simulated studies and show what was learnt (minutes, CPU)
  hlip prepare --config train.yaml             read all its studies once, into its cache
  hlip train --config train.yaml               train on your own studies and reports
  hlip evaluate runs/mine --studies test/ --labels labels.csv --prompts prompts.yaml
  hlip embed patient-*/ --run runs/mine --out features.npz
  hlip explain patient-17/ --run runs/mine --text "acute infarct"

'hlip COMMAND --help' explains each command. Not a medical device: not for diagnosis."""

_RUN = "a trained run's folder, e.g. runs/demo; or published weights: a file, a snapshot's folder, a Hugging Face id"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status (0 good, 1 nothing could be done, 2 bad usage, 128 + a signal's)."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # What pydicom warns of is told study by study. A filter, because importing pydicom sets its level.
    logging.getLogger("pydicom").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        status = args.run_command(args)
        sys.stdout.flush()
        return status
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and args.command in ("info", "embed", "evaluate", "explain"):
            # What they print goes into `head`, which has seen enough. Nothing is to be said of it at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # as the shell has it of a program that SIGPIPE ended
        # What people can mend (files, disks, settings, packages) comes as a line, not as a traceback.
        print(f"hlip {args.command}{_process()}: {_reason(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        why = f"a process that reads studies ahead has ended ({_one_line(error).rstrip('.')}); use fewer if memory is short"
        print(f"hlip {args.command}{_process()}: {why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:  # also a signal to stop, which says more
        print(f"\nhlip {args.command}{_process()}: {str(error) or 'stopped'}", file=sys.stderr)
        return getattr(error, "status", 130)


def _process() -> str:
    """Which of several processes (``torchrun``) this is."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ
    return f" (process {os.environ['RANK']} of {os.environ['WORLD_SIZE']})" if several else ""


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package '{error.name}' is needed: pip install 'hlip-kernels[all]'"
    if isinstance(error, OSError) and error.strerror:  # the system's own: without its number
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="hlip", description=DESCRIPTION, epilog=DETAILS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = _command(commands, "info", "say what is in a study: scans, slices, spacing, tokens", _info)
    p.add_argument("paths", nargs="*", metavar="PATH", help="a study's folder or file; or a folder of studies")
    p.add_argument("--model", default="clip-vit_base-scan_study-dualdinotxt1568", help="count tokens for this published model")
    p.add_argument("--preset", default="auto", help="how scans are prepared (default: guessed from the study)")
    p.add_argument("--presets", action="store_true", help="list the presets and stop")
    _links(p)
    _metadata(p)

    p = _command(commands, "embed", "turn studies into vectors", _embed)
    p.add_argument("paths", nargs="+", metavar="PATH", help="studies' folders or files; or folders of studies")
    p.add_argument("--run", required=True, help=_RUN)
    p.add_argument(
        "--out", default="features.npz", help="file to write: arrays 'studies' and 'features' (default: %(default)s)"
    )
    p.add_argument("--prompts", help="also score the studies: a benchmark's name or a YAML file")
    p.add_argument("--resume", action="store_true", help="go on where an earlier call for the same file ended")
    _links(p)
    _metadata(p)
    _prepared(p)
    _workers(p)
    _device(p)

    p = _command(commands, "evaluate", "score studies against sentences, and the scores against labels", _evaluate)
    p.add_argument("run", help=_RUN)
    p.add_argument("--studies", help="a folder of studies (default: the run's own validation studies)")
    p.add_argument("--features", metavar="FILE", help="instead of studies: what `hlip embed` wrote of them, with this model")
    p.add_argument("--labels", help="CSV with a column 'study' (or 'VolumeName') and one of 0 and 1 for each class")
    p.add_argument("--prompts", help="a benchmark's name or a YAML file of classes and templates")
    p.add_argument("--scores", metavar="FILE", help="also write every study's scores and labels, as CSV")
    _links(p)
    _metadata(p)
    _prepared(p)
    _workers(p)
    _device(p)

    p = _command(commands, "explain", "show which places of a study speak for a sentence", _explain)
    p.add_argument("study", metavar="STUDY", help="a study's folder or file")
    p.add_argument("--run", required=True, help=_RUN)
    p.add_argument("--text", help='a finding, as reports have it: "acute infarct"')
    p.add_argument("--prompts", help="instead: a benchmark's name or a YAML file of classes and templates")
    p.add_argument("--class", dest="target", default="", help="which of the classes of --prompts")
    p.add_argument(
        "--method", choices=("gradient", "occlusion"), default="gradient",
        help="gradient: one pass; occlusion: leaves out one patch after the other, a pass for each (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--out", help="folder to write: a map for each volume, a picture (default: explained/ and the study's name)")
    _links(p)
    _metadata(p)
    _prepared(p)
    _device(p)

    p = _command(commands, "train", "train a model on studies and their reports", _train)
    p.add_argument("--config", required=True, help="a YAML file; examples/train.yaml explains every field")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on where an interrupted run of this config stopped; start anew if none has begun",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace an earlier run in the config's run folder")
    _set(p)

    p = _command(commands, "prepare", "read all studies of a training config into its cache", _prepare)
    p.add_argument("--config", required=True, help="the YAML file that `hlip train` takes; data.cache is what is filled")
    p.add_argument("--workers", type=_count, default=_cpus(), metavar="N", help="processes (default: %(default)s)")
    p.add_argument(
        "--part", type=_part, default=(1, 1), metavar="K/N", help="every N-th study from the K-th on, e.g. for one of N jobs"
    )
    _set(p)

    p = _command(commands, "demo", "train on simulated studies, show what was learnt", _demo)
    p.add_argument("--run", default="runs/demo", help="folder to write (default: %(default)s)")
    p.add_argument("--minutes", type=float, default=None, help="training time (default: as in the demo's config)")
    return top


def _command(commands, name: str, what: str, function) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    p.set_defaults(run_command=function)
    return p


def _links(p: argparse.ArgumentParser) -> None:
    p.add_argument("--follow-links", action="store_true", help="follow links that lead out of the folders, as of DataLad")


def _metadata(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--metadata",
        metavar="FILE",
        help="CSV (or a folder of them) with slope, intercept and spacing of volume files, in place of their headers'",
    )


def _device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def _workers(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="processes that read studies ahead; 0: read in between (default: as in training)",
    )


def _set(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a field, e.g. --set data.workers=4 (repeatable)",
    )


def _part(text: str) -> tuple[int, int]:
    part, found, parts = text.partition("/")
    if not (found and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, as 3/8, got {text!r}")
    return int(part), int(parts)


def _cpus() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, got {text!r}")
    return int(text)


def _check_device(name: str) -> None:
    """Raises ValueError if nothing can be computed on the device of this name, before anything is loaded for it."""
    import torch

    try:
        if name != "auto":
            torch.ones(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # no such device, driver, number or backend
        why = _one_line(error).split(". ")[0][:250]
        raise ValueError(f"--device {name!r} cannot be used here ({why}): expected cpu, cuda, cuda:1, ... or auto") from error


def _info(args) -> int:
    from .info import info

    return info(args)


def _embed(args) -> int:
    from .embed import embed

    _check_device(args.device)
    return embed(args)


def _evaluate(args) -> int:
    from .evaluate import evaluate

    _check_device(args.device)
    return evaluate(args)


def _explain(args) -> int:
    from .explain import explain

    _check_device(args.device)
    return explain(args)


def _train(args) -> int:
    import torch

    from ..train import load_config, train

    metrics = train(load_config(args.config, _overrides(args)), resume=args.resume, overwrite=args.overwrite)
    if metrics is not None:
        print(metrics.table())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _prepare(args) -> int:
    from .prepare import prepare

    return prepare(args, _overrides(args))


def _overrides(args) -> dict:
    """Values of a config by dotted name, of ``--set``."""
    import yaml

    overrides = {}
    for item in args.set:
        name, found, value = item.partition("=")
        if not found:
            raise ValueError(f"--set takes NAME=VALUE, got {item!r}")
        try:
            overrides[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a date that does not exist
            raise ValueError(f"--set {item}: {value!r} is not readable as YAML ({_one_line(error)})") from error
    return overrides


def _demo(args) -> int:
    from ..demo import demo

    return demo(args.run, minutes=args.minutes)


def _prepared(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="", help="the published model that weights are of (default: told from their name)")
    p.add_argument("--preset", help="how scans are prepared (default: as for the model's training)")
