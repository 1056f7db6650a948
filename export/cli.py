"""The command line: one subcommand a verb, exit status 0 for success only, 1 for a failed gate, 2 for a user's mistake.

Results go to standard output and progress to standard error. With --json exactly one JSON document is printed, so
whatever a library prints on its own is sent to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from export.quiet import quiet_libraries
from export.stages import silent, to_stderr
from graphs.errors import GateError, UserError
from graphs.files import reason

Result = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vlmx: error: {message} (see `{self.prog} --help`)\n")


def request_of(args: argparse.Namespace) -> Any:
    """What to load, from the options that `export` and `plan` share."""
    from graphs.model import Request

    return Request(
        args.model, args.variant, args.checkpoint, args.seed, args.allow_pickle, args.allow_nan, args.max_context
    )


def export_command(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Result, str]:
    """`vlmx export`."""
    from calibration.source import Calibration
    from export.ceiling import watched
    from export.pipeline import ExportOptions, export

    extra = {key: value for key in ("delegate", "builder") if (value := getattr(args, key)) is not None}
    calibration = Calibration(args.calibration, args.calibration_count, args.calibration_seed)
    options = ExportOptions(
        request_of(args),
        args.target,
        args.quant,
        calibration,
        args.compress,
        args.out,
        args.force,
        args.verify,
        args.max_memory,
        extra,
        args.anew,
    )
    with watched(args.max_memory):
        out = export(options, say)
    manifest = json.loads((out / "manifest.json").read_text())
    total = sum(record["bytes"] for record in manifest["files"].values())
    lines = [f"{out}: {len(manifest['files'])} files, {total / 2**20:.1f} MiB"]
    return {"bundle": str(out), "manifest": manifest}, "\n".join(lines)


def verify_command(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Result, str]:
    """`vlmx verify`."""
    from export.check import verify_bundle
    from export.pipeline import describe

    entries = verify_bundle(args.bundle, say)
    text = "\n".join(f"{name}: {describe(entry)}" for name, entry in entries.items())
    return {"bundle": str(args.bundle), "lower": entries}, text


def run_command(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Result, str]:
    """`vlmx run`: the answer is shown as it grows."""
    from graphs.preprocess.image import load_image
    from runtimes.generate import sampler
    from runtimes.manifest import Bundle
    from runtimes.session import Session

    images = [load_image(path) for path in args.image]
    session = Session.open(Bundle.open(args.bundle), args.runtime)
    shown, last = "", None
    for last in session.stream(args.prompt, images, args.max_new_tokens, sampler(args.temperature, args.seed)):
        text = session.text(last)
        if text.startswith(shown) and not text.endswith("\ufffd") and not args.json:
            args.stdout.write(text[len(shown) :])
            args.stdout.flush()
            shown = text
    assert last is not None
    result = {
        "answer": session.text(last),
        "tokens": last.tokens,
        "prompt_tokens": last.prompt_tokens,
        "vision_ms": 1e3 * last.vision_seconds,
        "ttft_ms": 1e3 * last.first_token_seconds,
    }
    return result, session.text(last)[len(shown) :]


def bench_command(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Result, str]:
    """`vlmx bench`."""
    from export import planned
    from export.alone import alone
    from export.bench import bench, table
    from export.roofline import device

    if args.device is not None:
        device(args.device)  # refused before minutes of measuring
    rows = [
        alone(bench, path, args.runtime, args.repeat, args.prompt_tokens, args.new_tokens, say) for path in args.bundle
    ]
    if args.device is None:
        return {"rows": rows}, table(rows)
    for row in rows:
        row["planned"] = planned.compare(row, args.device)
    return {"device": args.device, "rows": rows}, f"{table(rows)}\n\n{planned.table(rows, args.device)}"


def plan_command(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Result, str]:
    """`vlmx plan`."""
    from export.plan import describe, plan

    result = plan(request_of(args), args.prompt_tokens, args.quant)
    return result, describe(result)


def calibrate_command(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Result, str]:
    """`vlmx calibrate`."""
    from export.calibrate import CalibrateOptions, calibrate, describe

    options = CalibrateOptions(request_of(args), args.out, args.data, args.count, args.seed, args.compress, args.force)
    statistics = calibrate(options, say)
    result = {"statistics": str(args.out), "layers": len(statistics), "origin": statistics.origin.to_json()}
    return result, describe(statistics, args.out)


def doctor_command(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Result, str]:
    """`vlmx doctor`."""
    from export.doctor import describe, doctor

    result = doctor()
    return result, describe(result)


def list_command(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Result, str]:
    """`vlmx list`."""
    from export.listing import LISTS

    chosen = [args.what] if args.what else list(LISTS)
    result = {name: LISTS[name]() for name in chosen}
    text = "\n".join(
        f"{name}:\n" + "\n".join(f"  {k:<22}{v}" for k, v in rows.items()) for name, rows in result.items()
    )
    return result, text


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def memory(text: str) -> int:
    """An argument that is a size in bytes."""
    from export.ceiling import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def temperature(text: str) -> float:
    """An argument that is a temperature."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100")
    return value


def parser() -> Parser:
    """The whole command line."""
    root = Parser(prog="vlmx", description=(sys.modules["export"].__doc__ or "").strip() or None)
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="COMMAND", parser_class=Parser)

    def verb(name: str, run: Callable[..., tuple[Result, str]], about: str) -> Parser:
        added: Parser = verbs.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        added.add_argument(
            "--json", action="store_true", help="print one JSON document on standard output, nothing else"
        )
        added.add_argument("--quiet", action="store_true", help="no progress on standard error")
        return added

    def source(added: Parser) -> None:
        added.add_argument("model", metavar="MODEL", help="a model (see `vlmx list models`)")
        added.add_argument(
            "--variant", metavar="V", help="a published size, or `tiny`; without --checkpoint: random weights"
        )
        added.add_argument("--checkpoint", metavar="DIR_OR_HUB_ID", help="weights in the public layout")
        added.add_argument("--seed", type=int, default=0, help="of random weights, and of samples")
        added.add_argument("--max-context", type=positive, metavar="TOKENS", help="bound the KV cache")
        added.add_argument("--allow-pickle", action="store_true", help="read legacy .bin weights (tensors only)")
        added.add_argument("--allow-nan", action="store_true", help="accept weights that hold NaN or Inf")

    def quant(added: Parser) -> None:
        added.add_argument("--quant", metavar="RECIPE", help="see `vlmx list recipes`; default: the target's own")

    added = verb("export", export_command, "compile a model for a target into a verified bundle")
    source(added)
    quant(added)
    added.add_argument("--target", required=True, metavar="T", help="see `vlmx list targets`")
    added.add_argument("--compress", default="", metavar="PASSES", help="see `vlmx list passes`")
    added.add_argument(
        "--calibration",
        default="zoo",
        metavar="DATA",
        help="for recipes that need it: zoo, a folder with a .jsonl, hf:NAME[:SPLIT], or what `vlmx calibrate` wrote",
    )
    added.add_argument("--calibration-count", type=positive, default=64, metavar="N", help="samples to draw of it")
    added.add_argument("--calibration-seed", type=int, default=0, metavar="N", help="what draws them")
    added.add_argument("--out", type=Path, metavar="DIR", help="default: bundles/VARIANT-TARGET")
    added.add_argument("--force", action="store_true", help="replace the bundle at --out")
    added.add_argument(
        "--anew", action="store_true", help="take nothing over from an interrupted export, or from bundles beside --out"
    )
    added.add_argument(
        "--verify",
        default="auto",
        metavar="HOW",
        help="whole, sample (one layer of each kind), or auto: whole up to 1 GiB of float32 weights",
    )
    added.add_argument(
        "--max-memory",
        type=memory,
        metavar="SIZE",
        help="as in 2GiB: refuse an export that will take more, stop one that does",
    )
    added.add_argument("--delegate", metavar="NAME", help="executorch: the delegate")
    added.add_argument("--builder", metavar="NAME", help="tensorrt: tensorrt or tensorrt-rtx")

    added = verb("run", run_command, "answer a prompt about pictures")
    added.add_argument("bundle", type=Path, metavar="BUNDLE")
    added.add_argument("--image", type=Path, action="append", default=[], metavar="F", help="may be repeated")
    added.add_argument("--prompt", required=True, metavar="S")
    added.add_argument("--max-new-tokens", type=positive, default=128, metavar="N")
    added.add_argument("--temperature", type=temperature, default=0.0, help="0 (the default) is greedy")
    added.add_argument("--seed", type=int, default=0, help="of sampling")
    added.add_argument("--runtime", metavar="NAME", help="`eager`: the source graph by torch")

    added = verb("verify", verify_command, "check a bundle's files and its numbers on this machine")
    added.add_argument("bundle", type=Path, metavar="BUNDLE")

    added = verb("bench", bench_command, "measure latency, memory and size of bundles")
    added.add_argument("bundle", type=Path, nargs="+", metavar="BUNDLE")
    added.add_argument("--runtime", metavar="NAME", help="`eager`: the source graph by torch")
    added.add_argument("--repeat", type=positive, default=5, metavar="N")
    added.add_argument("--prompt-tokens", type=positive, default=16, metavar="N", help="of text, besides the picture")
    added.add_argument("--new-tokens", type=positive, default=32, metavar="N")
    added.add_argument("--device", metavar="NAME", help="beside what `vlmx plan` says of that device (its names)")

    added = verb("plan", plan_command, "what a model costs, before any weight is read")
    source(added)
    quant(added)
    added.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="of text, besides the picture")

    added = verb("calibrate", calibrate_command, "collect what quantization must know of a model's activations")
    source(added)
    added.add_argument("--compress", default="", metavar="PASSES", help="see `vlmx list passes`")
    added.add_argument("--data", default="zoo", metavar="D", help="zoo, a folder with a JSONL, or hf:NAME[:SPLIT]")
    added.add_argument("--count", type=positive, default=64, metavar="N", help="of samples")
    added.add_argument("--out", type=Path, required=True, metavar="FILE", help="as in stats.safetensors")
    added.add_argument("--force", action="store_true", help="replace the file at --out")

    verb("doctor", doctor_command, "what each target can do on this machine")

    added = verb("list", list_command, "models, targets, passes, recipes")
    added.add_argument("what", nargs="?", metavar="WHAT", help="models, targets, passes or recipes")
    return root


@contextmanager
def standard_output_kept() -> Iterator[Any]:
    """The real standard output as a file; until the end, file descriptor 1 is standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    file = os.fdopen(kept, "w")
    try:
        yield file
        file.flush()
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        file.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    args = parser().parse_args(arguments)
    quiet_libraries()
    try:
        with standard_output_kept() as stdout:
            args.stdout = stdout
            result, text = args.run(args, silent if args.quiet else to_stderr)
            stdout.write((json.dumps(result, indent=2, allow_nan=False) if args.json else text) + "\n")
        return 0
    except UserError as error:
        return fail(args, f"vlmx: error: {one_line(error)}", 2)
    except GateError as error:
        return fail(args, f"vlmx: FAILED: {one_line(error)}", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(args, f"vlmx: error: {where}{reason(error)}", 2)
    except KeyboardInterrupt:
        return fail(args, "vlmx: interrupted", 130)
    except Exception as error:
        return fail(args, f"vlmx: internal error: {type(error).__name__}: {one_line(error)} (--debug shows more)", 3)


def one_line(error: BaseException) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


def fail(args: argparse.Namespace, line: str, status: int) -> int:
    """Print why, and give the exit status."""
    if args.debug:
        traceback.print_exc()
    to_stderr(line)
    return status


def entry() -> NoReturn:
    """The command `vlmx`: leaves as soon as all is written; taking the graphs of a large model apart takes seconds."""
    status = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    entry()
