"""Asks a trained model a benchmark's questions and scores the answers as its authors do.

  python launch/evaluate.py --checkpoint RUN --benchmark textvqa --data data/MGM-Eval
  python launch/evaluate.py --checkpoint RUN --benchmark textvqa,mme,mmbench,mmmu
  python launch/evaluate.py --checkpoint RUN --benchmark mmvet --judge gpt-4-0613

DATA has the official files in the original's layout; what is missing is listed, with where it comes
from.  OUTPUT/BENCHMARK gets the official answer files, score.json and wrong.html; OUTPUT gets
report.md and report.json of all benchmarks so far, beside the paper's figures.  The same command
goes on where it was stopped; with other hosts, too.
"""
from __future__ import annotations

import argparse
import logging
import pathlib
import sys

from mgjax.terminal import exit_code, note, ticking


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line, parsed; argparse reports what is wrong with it and exits with 2."""
  from mgjax.evaluate.benchmarks import BENCHMARKS
  names = "\n".join(f"  {name:16} {b.title} ({b.folder}/)" for name, b in BENCHMARKS.items())
  summary, _, rest = __doc__.partition("\n")
  parser = argparse.ArgumentParser(
      prog="evaluate.py", description=summary, epilog=f"{rest}\nbenchmarks:\n{names}",
      allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="DIR",
      help="folder of a training run (its --workdir) or of a converted model")
  add("--step", type=int, metavar="N", help="which saved step; default: the newest")
  add("--benchmark", required=True, metavar="NAMES", help="one or several, with commas between")
  add("--data", type=pathlib.Path, default=pathlib.Path("data/MGM-Eval"), metavar="DIR",
      help="folder of all benchmarks (default: data/MGM-Eval)")
  add("--output", type=pathlib.Path, metavar="DIR",
      help="folder of the results, which all hosts must see (default: work_dirs/evaluate/NAME)")
  add("--limit", type=int, default=0, metavar="N",
      help="only the first N questions of each benchmark: a trial, not its figure")
  add("--rows", type=int, default=32, metavar="N", help="answers that grow at once (default: 32)")
  add("--max-length", type=int, metavar="N",
      help="longest prompt and answer together, in tokens; default: as in training")
  add("--quantize", choices=("int8", "int4"), help="weights in fewer bytes")
  add("--cache-dtype", choices=("int8",), help="keys and values in fewer bytes")
  add("--wrong", type=int, default=200, metavar="N",
      help="wrong answers that wrong.html shows (default: 200)")
  judge = parser.add_argument_group("the judge, where the official scorer asks a language model")
  add = judge.add_argument
  add("--judge", metavar="MODEL", help="its name; without one, what needs it is not scored")
  add("--judge-url", metavar="URL", help="an endpoint of OpenAI's protocol (default: "
      "$OPENAI_BASE_URL, or OpenAI's)")
  add("--judge-key-env", default="OPENAI_API_KEY", metavar="NAME",
      help="environment variable of its key (default: OPENAI_API_KEY)")
  add("--judge-requests-per-minute", type=int, metavar="N", help="limit (default: none)")
  hosts = parser.add_argument_group("several hosts (a TPU pod is found by itself)")
  add = hosts.add_argument
  add("--coordinator", default="", metavar="HOST:PORT", help="where the hosts meet: host 0's")
  add("--hosts", type=int, default=0, metavar="N", help="how many there are")
  add("--host", type=int, default=-1, metavar="I", help="which one this is, from 0")
  args = parser.parse_args(argv)
  for name in ("limit", "wrong"):
    if getattr(args, name) < 0:
      parser.error(f"--{name} is {getattr(args, name)}, expected 0 or more")
  return args


def evaluate(args: argparse.Namespace) -> None:
  """What the arguments describe.  Raises ValueError, OSError or what a judge's endpoint does."""
  import dataclasses
  import functools

  import jax
  from tqdm import tqdm

  import mgjax
  from mgjax.checkpoint import STEPS, read_run
  from mgjax.config import ModelConfig, build
  from mgjax.endpoint.client import EndpointConfig
  from mgjax.evaluate import report, run, wrong
  from mgjax.evaluate.benchmarks import find
  from mgjax.evaluate.published import preset_of

  benchmarks = [find(name.strip()) for name in args.benchmark.split(",")]
  folder = pathlib.Path(args.checkpoint)
  step, values = read_run(folder if args.step is None else folder / STEPS / str(args.step))
  preset = preset_of(build(ModelConfig, values["model"], f"{folder}: model"))
  model = step.parent.parent.name
  output = args.output or pathlib.Path("work_dirs/evaluate") / model
  judge = args.judge and EndpointConfig(
      model=args.judge, base_url=args.judge_url, api_key_env=args.judge_key_env,
      requests_per_minute=args.judge_requests_per_minute)
  # All files are looked at before the first question is asked.
  questions = [run.read_questions(b, args.data, args.limit) for b in benchmarks]
  host = run.Host(jax.process_index(), jax.process_count())
  settings = {"max_length": args.max_length, "quantize": args.quantize,
              "cache_dtype": args.cache_dtype}

  @functools.cache
  def load():
    with ticking(f"loading {model}"):
      return mgjax.load(step, max_length=args.max_length, rows=args.rows, quantize=args.quantize,
                        cache_dtype=args.cache_dtype, devices=jax.local_devices())

  for benchmark, asked in zip(benchmarks, questions):
    place = output / benchmark.name
    run.ask(benchmark, asked, place,
            run.Asked(str(step.resolve()), run.digest(asked), settings), load, host,
            lambda answers, total, name=benchmark.name: tqdm(
                answers, name, total, unit="answers", disable=host.index > 0))
    done = run.collect(benchmark, asked, place, model, judge or None, host, note)
    if done is None:
      continue
    answered, score = done
    if score is None:
      note(f"{benchmark.title}: not scored here; " + (
          f"--judge MODEL does it (officially {benchmark.judging.model})" if benchmark.score else
          "its answers are not published: hand in the file above"))
      continue
    if args.limit:
      score = dataclasses.replace(score, notes=(
          f"only the first {len(asked):,} questions: not the benchmark's figure", *score.notes))
    shown = {"checkpoint": str(step), "decoding": "greedy",
             "max_new_tokens": benchmark.max_new_tokens} | {k: v for k, v in settings.items() if v}
    if benchmark.judging:
      shown["judge"] = args.judge or "none"
    report.keep(report.Entry(benchmark.name, benchmark.title, len(asked), score, shown), place)
    (place / "wrong.html").write_text(
        wrong.page(benchmark, answered, score, model, shown, args.wrong), encoding="utf-8")
    note(f"{place / 'wrong.html'}")
    report.save(output, model, preset)
    print(report.table(score.headline, model, preset))
  if not host.index:
    note(f"{output / 'report.md'}")


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  args = arguments(argv)
  logging.getLogger("absl").setLevel(logging.ERROR)

  from mgjax.data.journal import JournalError
  from mgjax.endpoint.client import EndpointError
  from mgjax.endpoint.pacing import Stopped
  from mgjax.train.hosts import joined
  expected = (ValueError, OSError, JournalError, EndpointError, Stopped)

  def body():
    with joined(coordinator=args.coordinator, hosts=args.hosts, host=args.host, mistakes=expected):
      evaluate(args)
  return exit_code(body, expected=expected)


if __name__ == "__main__":
  sys.exit(main())
