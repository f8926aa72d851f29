"""Talks with a trained model.

  python launch/chat.py --checkpoint RUN --image photo.jpg --prompt "What does the sign say?"
  python launch/chat.py --checkpoint RUN --image a.jpg --image b.jpg        # a conversation

With --prompt only the answer goes to the standard output.  Without it every line is a question;
/help lists the commands, /exit or Ctrl-D ends, and Ctrl-C stops an answer.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import os
import pathlib
import shutil
import sys
import unicodedata
from collections.abc import Callable

HELP = """\
/image FILE  add a picture to the next question
/drop        take away the pictures that wait for the next question
/clear       forget the conversation and its pictures
/help        this list
/exit        end (Ctrl-D too); Ctrl-C stops an answer"""
HISTORY = pathlib.Path("~/.mgjax_history")  # of what was typed, for the arrow keys
BOLD, DIM, RED = 1, 2, 31


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line, parsed; argparse reports what is wrong with it and exits with 2."""
  summary, _, rest = __doc__.partition("\n")
  parser = argparse.ArgumentParser(
      prog="chat.py", description=summary, epilog=f"{rest}\n{HELP}", allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="DIR",
      help="folder of a training run (its --workdir)")
  add("--step", type=int, metavar="N", help="which saved step; default: the newest")
  add("--image", action="append", default=[], metavar="FILE",
      help="a picture for the first question; may be given several times")
  add("--hd", action=argparse.BooleanOptionalAction,
      help="pictures of an HD model at its full or at its standard size (default: full)")
  add("--ocr", action="store_true",
      help="read the words in the pictures, a hint behind every question (needs the extra 'ocr')")
  add("--show-mining", metavar="FILE.png",
      help="save what the first picture's visual tokens look at in high resolution")
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
  add("--quantize", choices=("int8", "int4"), help="weights in fewer bytes (default: as saved)")
  add("--cache_dtype", choices=("int8", "bfloat16", "float32"),
      help="keys and values in fewer bytes (default: as the model)")
  add("--template", metavar="NAME", help="conversation template; default: that of the training")
  return parser.parse_args(argv)


def open_chat(args: argparse.Namespace):
  """The conversation that the arguments describe.  Raises ValueError, OSError or ImageError."""
  from mgjax.data.images import check_header
  from mgjax.infer import ocr
  from mgjax.infer.assistant import load
  from mgjax.infer.sampling import Sampling

  sampling = Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                      max_new_tokens=256 if args.max_new_tokens is None else args.max_new_tokens,
                      seed=args.seed)
  for path in args.image:  # all this before minutes of loading
    check_header(path)
  if args.ocr:
    ocr.reader()
  if args.show_mining is not None:
    check_show_mining(args)
  # Orbax warns that it leaves out the position in the training data: that is as it should be.
  logging.getLogger("absl").setLevel(logging.ERROR)
  model = load(args.checkpoint, template=args.template, max_length=args.max_length, step=args.step,
               quantize=args.quantize, cache_dtype=args.cache_dtype)
  sides = model.engine.picture_sides
  if args.hd is not None and len(sides) == 1:
    raise ValueError(f"--hd and --no-hd are for HD models; {args.checkpoint} sees pictures at one "
                     f"size, {sides[0]} x {sides[0]}")
  if args.show_mining is not None:
    save_mining(model, args)
  chat = model.conversation(sampling, fit=args.max_new_tokens is None)
  for path in args.image:
    attach(chat, path, args)
  return chat


def attach(chat, path: str, args: argparse.Namespace) -> None:
  """Adds a picture to the next question, seen as the arguments say.  Raises ImageError."""
  from mgjax.infer.ocr import read_text
  chat.attach(path, hd=args.hd is not False, texts=read_text(path) if args.ocr else ())


def check_show_mining(args: argparse.Namespace) -> None:
  """ValueError unless there is something to show and a place to save it."""
  if not args.image:
    raise ValueError("--show-mining shows the first picture; give one with --image")
  file = pathlib.Path(args.show_mining)
  if file.suffix.lower() != ".png" or not file.parent.is_dir():
    raise ValueError(f"--show-mining {file}: expected a .png file in a folder that exists")


def save_mining(model, args: argparse.Namespace) -> None:
  """The heat map of the first picture.  Raises ValueError if the model has no mining."""
  from mgjax.sharding import mesh_context
  from mgjax.visualize import heat_map, mined_weights
  pixels = model.pixels(args.image[0], args.hd is not False)
  with mesh_context(model.engine.mesh):
    weights = mined_weights(model.engine.programs.model, pixels)
  heat_map(pixels, weights, model.engine.config).save(args.show_mining)
  note(f"{args.show_mining}: what the visual tokens of {args.image[0]} look at")


# The terminal.

def is_terminal(stream) -> bool:
  """Whether what is written there is looked at, and the cursor can be moved."""
  return stream.isatty() and os.environ.get("TERM") != "dumb"


def styled(text: str, style: int, stream) -> str:
  """The text in a style, where it is looked at and NO_COLOR does not forbid it."""
  coloured = is_terminal(stream) and not os.environ.get("NO_COLOR")
  return f"\033[{style}m{text}\033[0m" if coloured else text


def note(text: str) -> None:
  """A remark beside the conversation."""
  print(styled(f"[{text}]", DIM, sys.stderr), file=sys.stderr)


def complain(message: str) -> None:
  """What is wrong, on one line."""
  message = " ".join(message.split())
  print(f"{styled('error:', RED, sys.stderr)} {message}", file=sys.stderr)


def cells(text: str) -> int:
  """Places that the text takes in a line of a terminal."""
  return sum(0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else
             2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class Wrapped:
  """Breaks text between words although every piece of it is shown at once: a word that turns out
  too long for its line is taken back and begun again on the next."""

  def __init__(self, columns: int):
    self._columns = max(1, columns - 1)  # a cursor behind the last place is nowhere in particular
    self._word, self._column = "", 0     # the word that grows, and where the cursor is

  def feed(self, piece: str) -> str:
    """What to write to the terminal for that piece; control characters are left out."""
    return "".join(map(self._put, piece.replace("\t", "    ")))

  def _put(self, c):
    if c == "\n":
      return self._new_line()
    if unicodedata.category(c) == "Cc":
      return ""
    if self._column + cells(c) <= self._columns:
      broken = ""
    elif c == " ":
      return self._new_line()
    else:
      word = self._word if cells(self._word) < self._column else ""  # else it has a whole line
      broken = f"\033[{cells(word)}D\033[K" if word else ""
      broken += self._new_line() + word
      self._word, self._column = word, cells(word)
    # Between characters of two places a line may break anywhere.
    self._word = "" if c == " " or cells(c) == 2 else self._word + c
    self._column += cells(c)
    return broken + c

  def _new_line(self):
    self._word, self._column = "", 0
    return "\n"


def writer() -> Callable[[str], None]:
  """What shows the pieces of an answer, each at once."""
  shown = lambda text: print(text, end="", flush=True)
  if not is_terminal(sys.stdout):
    return shown
  wrapped = Wrapped(shutil.get_terminal_size().columns)
  return lambda piece: shown(wrapped.feed(piece))


def edit_lines() -> None:
  """Arrow keys, file names by Tab, and what was typed in earlier conversations, in a terminal."""
  if not sys.stdin.isatty():
    return
  try:
    import readline
  except ImportError:  # not on every system
    return
  readline.parse_and_bind("tab: complete")
  readline.set_completer_delims(" ")
  readline.set_history_length(1000)
  file = HISTORY.expanduser()
  with contextlib.suppress(OSError):
    readline.read_history_file(file)

  def save():
    with contextlib.suppress(OSError):  # a home that cannot be written is no reason to fail
      readline.write_history_file(file)
  atexit.register(save)


def prompt() -> str:
  """What asks for a line.  The marks tell readline which characters take no place."""
  mark = styled("> ", BOLD, sys.stdout)
  if mark == "> " or "readline" not in sys.modules:
    return mark
  return mark.replace("\033", "\001\033").replace("m", "m\002")


# The conversation.

def say(chat, question: str) -> None:
  """Prints an answer as it comes, up to Ctrl-C."""
  pieces, show = chat.ask(question), writer()
  try:
    for piece in pieces:
      show(piece)
  except KeyboardInterrupt:
    pieces.close()
    show(" [stopped]")
  print()
  if chat.cut:
    note("cut: the answer reached the most tokens it may have")


def obey(chat, line: str, args: argparse.Namespace) -> bool:
  """Does what a line says; whether it was the last.  Raises ValueError and what `attach` does."""
  command, _, rest = line.partition(" ")
  if command == "/exit":
    return True
  elif command == "/help":
    print(HELP, file=sys.stderr)
  elif command == "/clear":
    chat.clear()
    note("a new conversation")
  elif command == "/drop":
    chat.drop()
    note("no picture waits for the next question")
  elif command == "/image":
    attach(chat, file_name(rest), args)
    note(f"pictures for the next question: {chat.waiting}")
  elif command.startswith("/"):
    raise ValueError(f"unknown command {command}; /help lists them")
  elif line:
    say(chat, line)
  return False


def file_name(text: str) -> str:
  """A file as it is typed, or dropped onto a terminal: quoted, say.  ValueError if it is empty."""
  text = text.strip()
  if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
    text = text[1:-1]
  if not text:
    raise ValueError("which picture? /image FILE")
  return os.path.expanduser(text)


def converse(chat, args: argparse.Namespace) -> None:
  """Reads questions line by line until /exit or the end of the input."""
  edit_lines()
  note("ask a question; /help lists the commands")
  ended = False
  while not ended:
    try:
      ended = obey(chat, input(prompt()).strip(), args)
    except EOFError:
      print()
      ended = True
    except KeyboardInterrupt:  # at the prompt it drops the line, as in a shell
      print()
    except UnicodeDecodeError as error:
      complain(f"that line is not UTF-8 ({error})")
    except expected_errors() as error:
      complain(str(error))


def expected_errors() -> tuple[type[Exception], ...]:
  """What wrong input raises; anything else is a bug and keeps its traceback."""
  from mgjax.data.images import ImageError
  return (ImageError, ValueError, OSError)


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  args = arguments(argv)
  try:
    chat = open_chat(args)
    if args.prompt is not None:
      say(chat, args.prompt)
    else:
      converse(chat, args)
  except expected_errors() as error:
    complain(str(error))
    return 2
  except KeyboardInterrupt:
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
