"""Makes training data: shards of a data set, or the records that teach to draw.

  python launch/prepare_data.py shards --data data/MGM-Finetune/mgm_instruction.json \\
      --image-root data/MGM-Finetune --output data/shards/instruction --workers 16

  python launch/prepare_data.py prompts --captions captions.json --contexts chats.json \\
      --model NAME --output data/generation --price-in 10 --price-out 30 --budget 50

`prepare_data.py COMMAND --help` tells the rest.
"""
from __future__ import annotations

import argparse
import json
import sys
import time


def add_shards(subparsers) -> None:
  """The command `shards`."""
  parser = subparsers.add_parser(
      "shards", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
      help="a data set in few large files, pictures and conversations together",
      description="Writes ArrayRecord shards: OUTPUT/shards.json lists them.  Train with\n"
                  "--config.data.path=OUTPUT.",
      epilog="The same command again makes only what is missing.  Exit code: 0 all shards are "
             "there, 1 error.")
  parser.set_defaults(run=run_shards)
  add = parser.add_argument
  add("--data", required=True, metavar="FILE", help="LLaVA .json or .jsonl")
  add("--image-root", default="", metavar="DIR", help="the folder that its images are relative to")
  add("--output", required=True, metavar="DIR", help="made where it is missing")
  add("--records-per-shard", type=int, default=4096, metavar="N", help="default: 4096")
  add("--resize", type=int, default=0, metavar="H",
      help="shrink larger pictures to the model's high resolution, 768 or 1536 (default: keep the "
           "files' bytes)")
  add("--aspect", choices=("pad", "square"), default="pad",
      help="how the model will see them: the longer side becomes H, or the shorter (default: pad)")
  add("--quality", type=int, default=95, metavar="Q",
      help="of the JPEG that a shrunk picture becomes (default: 95)")
  add("--workers", type=int, default=0, metavar="N", help="processes (default: this one alone)")
  add("--on-error", choices=("stop", "skip"), default="stop",
      help="bad samples stop the run (default), or are left out and listed in skipped.jsonl")


def run_shards(args: argparse.Namespace) -> int:
  from mgjax.data.prepare import ShardConfig, write_shards
  config = ShardConfig(
      args.data, args.image_root, args.output, args.records_per_shard, args.resize, args.aspect,
      args.quality, args.workers, args.on_error)
  started = time.perf_counter()
  manifest = write_shards(config)
  seconds = time.perf_counter() - started
  skipped = ", ".join(f"{kind} {n}" for kind, n in manifest["skipped"].items()) or "none"
  print(f"{args.output}: {len(manifest['shards']):,} shards, {manifest['records']:,} records, "
        f"{manifest['pictures']:,} pictures, {manifest['bytes']:,} bytes; left out: {skipped}; "
        f"{seconds:,.0f} s")
  return 0


def add_prompts(subparsers) -> None:
  """The command `prompts`."""
  parser = subparsers.add_parser(
      "prompts", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
      help="text records that teach to write a diffusion prompt, written by a language model",
      description="Has a language model write records that ask for a picture (<GEN>) and answer "
                  "with a\nprompt (<h>...</h>): OUTPUT/generation.json, LLaVA JSON without "
                  "pictures.",
      epilog="The same command again asks only for what is missing.  Exit code: 0 the file is "
             "written, 1\nerror, 3 stopped before the end by --budget or a signal.")
  parser.set_defaults(run=run_prompts)
  add = parser.add_argument_group("what").add_argument
  add("--captions", default="", metavar="FILE",
      help='descriptions of pictures: JSON list or lines of {"id", "caption"}, or LLaVA JSON')
  add("--contexts", default="", metavar="FILE",
      help="conversations that shall go on with a picture: LLaVA JSON, text only")
  add("--output", required=True, metavar="DIR", help="folder of the results and of the work so far")
  add("--examples", default="", metavar="FILE",
      help="good prompts, one a line; each request shows some, for the style (default: built in)")
  add("--shots", type=int, default=5, metavar="N", help="how many it shows (default: 5)")
  add("--words", type=int, nargs=2, default=(8, 55), metavar=("MIN", "MAX"),
      help="length of a prompt; SDXL reads 75 tokens (default: 8 55)")
  add("--on-error", choices=("stop", "skip"), default="stop",
      help="unusable inputs stop the run (default), or are left out and listed in skipped.jsonl")
  add("--retries", type=int, default=2, metavar="N",
      help="further requests after an unusable reply, before it is listed in failed.jsonl "
           "(default: 2)")
  add("--retry-failed", action="store_true", help="ask again for what failed.jsonl lists")
  add("--seed", type=int, default=0, help="of the examples shown, and sent along (default: 0)")
  add = parser.add_argument_group("endpoint").add_argument
  add("--model", required=True, metavar="NAME", help="the language model")
  add("--base-url", metavar="URL",
      help="of a server with OpenAI's protocol, e.g. http://localhost:8000/v1 (default: "
           "$OPENAI_BASE_URL, or OpenAI's)")
  add("--api-key-env", default="OPENAI_API_KEY", metavar="NAME",
      help="environment variable that holds the key (default: OPENAI_API_KEY)")
  add("--temperature", type=float, default=0.7, help="of the replies (default: 0.7)")
  add("--max-tokens", type=int, default=600, metavar="N",
      help="longest reply in tokens (default: 600)")
  add("--body", type=json_object, default={}, metavar="JSON",
      help="fields to add to each request, null to leave one out: "
           """'{"max_tokens": null, "max_completion_tokens": 2000}'""")
  add("--timeout", type=float, default=120.0, metavar="S",
      help="seconds for a reply (default: 120)")
  add("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
  add("--requests-per-minute", type=int, metavar="N", help="limit (default: none)")
  add("--tokens-per-minute", type=int, metavar="N", help="limit (default: none)")
  add("--price-in", type=float, default=0.0, metavar="X", help="of a million prompt tokens")
  add("--price-out", type=float, default=0.0, metavar="X", help="of a million tokens replied")
  add("--budget", type=float, metavar="X",
      help="stop before all runs into OUTPUT together cost more")


def run_prompts(args: argparse.Namespace) -> int:
  from mgjax.data.drawing.run import PromptsConfig, make_prompts
  from mgjax.endpoint.client import EndpointConfig

  config = PromptsConfig(
      output=args.output, captions=args.captions, contexts=args.contexts, examples=args.examples,
      shots=args.shots, words=tuple(args.words), retries=args.retries,
      retry_failed=args.retry_failed, on_error=args.on_error, concurrency=args.concurrency,
      seed=args.seed)
  endpoint = EndpointConfig(
      model=args.model, base_url=args.base_url, api_key_env=args.api_key_env,
      temperature=args.temperature, max_tokens=args.max_tokens, body=args.body,
      timeout=args.timeout, requests_per_minute=args.requests_per_minute,
      tokens_per_minute=args.tokens_per_minute, price_in=args.price_in, price_out=args.price_out,
      budget=args.budget)
  outcome = make_prompts(config, endpoint, report=lambda line: print(line, flush=True))
  if outcome.left:
    print(f"stopped ({outcome.why}): {outcome.made:,} made, {outcome.left:,} left; the same "
          "command goes on")
    return 3
  return 0


def json_object(text: str) -> dict:
  value = json.loads(text)
  if not isinstance(value, dict):
    raise ValueError
  return value


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
      prog="prepare_data.py", description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
  add_shards(subparsers)
  add_prompts(subparsers)
  args = parser.parse_args(argv)

  from mgjax.config import ConfigError
  from mgjax.data.journal import JournalError
  from mgjax.data.samples import DataError
  from mgjax.endpoint.client import EndpointError
  try:
    return args.run(args)
  except (ConfigError, DataError, EndpointError, JournalError, OSError) as e:
    sys.exit(f"error: {e}")
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main())
