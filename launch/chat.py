"""Talks with a trained model.

  python launch/chat.py --checkpoint RUN --image photo.jpg --prompt "What does the sign say?"
  python launch/chat.py --checkpoint RUN --image photo.jpg        # a conversation

With --prompt only the answer goes to the standard output.  Without it every line is a question;
/image FILE adds a picture to the next one, /drop takes it away again, /clear starts afresh, /exit
or Ctrl-D ends, and Ctrl-C stops an answer.
"""
from __future__ import annotations

import argparse
import logging
import sys

_HELP = ("/image FILE adds a picture to the next question, /drop takes it away again, "
         "/clear starts afresh, /exit ends")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line, parsed; argparse reports what is wrong with it and exits with 2."""
  summary, _, rest = __doc__.partition("\n")
  parser = argparse.ArgumentParser(
      prog="chat.py", description=summary, epilog=rest, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="DIR",
      help="folder of a training run (its --workdir)")
  add("--step", type=int, metavar="N", help="which saved step; default: the newest")
  add("--image", action="append", default=[], metavar="FILE",
      help="a picture for the first question; may be given several times")
  add("--prompt", metavar="TEXT", help="ask this one question, print the answer and exit")
  add("--temperature", type=float, default=0.0,
      help="0 always takes the likeliest word (default); higher is freer")
  add("--top_p", type=float, default=1.0,
      help="draw from the likeliest words that reach this probability (default: 1, all)")
  add("--top_k", type=int, default=0, help="draw from this many words (default: 0, all)")
  add("--max_new_tokens", type=int, metavar="N",
      help="longest answer in tokens (default: what --max_length leaves, at most 256)")
  add("--max_length", type=int, metavar="N",
      help="longest conversation in tokens (default: that of the training)")
  add("--seed", type=int, default=0, help="of the random draws (default: 0)")
  add("--template", metavar="NAME", help="conversation template; default: that of the training")
  return parser.parse_args(argv)


def open_chat(args: argparse.Namespace):
  """The conversation that the arguments describe.  Raises ValueError, OSError or ImageError."""
  from mgjax.data.images import check_header
  from mgjax.infer.assistant import load
  from mgjax.infer.sampling import Sampling

  sampling = Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                      max_new_tokens=256 if args.max_new_tokens is None else args.max_new_tokens,
                      seed=args.seed)
  for path in args.image:  # before minutes of loading
    check_header(path)
  # Orbax warns that it leaves out the position in the training data: that is as it should be.
  logging.getLogger("absl").setLevel(logging.ERROR)
  model = load(args.checkpoint, template=args.template, max_length=args.max_length, step=args.step)
  chat = model.conversation(sampling, fit=args.max_new_tokens is None)
  for path in args.image:
    chat.attach(path)
  return chat


def say(chat, question: str) -> None:
  """Prints an answer as it comes, up to Ctrl-C."""
  pieces = chat.ask(question)
  try:
    for piece in pieces:
      print(piece, end="", flush=True)
  except KeyboardInterrupt:
    pieces.close()
    print(" [stopped]", end="")
  print()
  if chat.cut:
    print("[cut: the answer reached the most tokens it may have]", file=sys.stderr)


def converse(chat) -> None:
  """Reads questions line by line until /exit or the end of the input."""
  print(_HELP, file=sys.stderr)
  while True:
    try:
      line = input("> ").strip()
    except EOFError:
      return print()
    except UnicodeDecodeError as error:
      print(f"error: that line is not UTF-8 ({error})", file=sys.stderr)
      continue
    except KeyboardInterrupt:  # at the prompt it drops the line, as in a shell
      print()
      continue
    command, _, rest = line.partition(" ")
    try:
      if command == "/exit":
        return
      elif command == "/clear":
        chat.clear()
      elif command == "/drop":
        chat.drop()
      elif command == "/image":
        chat.attach(rest.strip())
      elif command.startswith("/"):
        print(f"unknown command {command}: {_HELP}", file=sys.stderr)
      elif line:
        say(chat, line)
    except expected_errors() as error:
      print(f"error: {one_line(error)}", file=sys.stderr)


def expected_errors() -> tuple[type[Exception], ...]:
  """What wrong input raises; anything else is a bug and keeps its traceback."""
  from mgjax.data.images import ImageError
  return (ImageError, ValueError, OSError)


def one_line(error: Exception) -> str:
  """The message without line breaks."""
  return " ".join(str(error).split())


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  args = arguments(argv)
  try:
    chat = open_chat(args)
    if args.prompt is not None:
      say(chat, args.prompt)
    else:
      converse(chat)
  except expected_errors() as error:
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
