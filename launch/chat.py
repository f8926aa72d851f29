"""Talks with a trained model.

  python launch/chat.py --checkpoint RUN --image photo.jpg --prompt "What does the sign say?"
  python launch/chat.py --checkpoint RUN --image a.jpg --image b.jpg        # a conversation

With --prompt only the answer goes to the standard output.  Without it every line is a question;
/help lists the commands, /exit or Ctrl-D ends, and Ctrl-C stops an answer.

  python launch/chat.py --checkpoint RUN --draw SDXL --image photo.jpg --prompt "the same by night"

With --draw the model answers --prompt, or what follows /draw, with a prompt for SDXL, which paints
it.  The picture is saved, and goes with the next question.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import logging
import os
import pathlib
import sys
import time

from mgjax.infer.gallery import Gallery, size
from mgjax.terminal import BOLD, complain, exit_code, note, styled, ticking, writer

HELP = """\
/image FILE  add a picture to the next question
/draw WORDS  ask for a picture (with --draw)
/redraw      ask the last question again, for an answer that begins with a prompt to paint
/drop        take away the pictures that wait for the next question
/clear       forget the conversation and its pictures
/help        this list
/exit        end (Ctrl-D too); Ctrl-C stops an answer"""
HISTORY = pathlib.Path("~/.mgjax_history")  # of what was typed, for the arrow keys
DRAWING = "drawing (needs --draw)"


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
  group = parser.add_argument_group(DRAWING)
  add = group.add_argument
  add("--draw", metavar="DIR", help="folder of a converted SDXL; --prompt and /draw paint with it")
  add("--draw_to", metavar="FILE.png", default="picture.png",
      help="where to save the picture; no file is written over, further ones are numbered "
      "(default: picture.png)")
  add("--draw_size", type=size, metavar="WxH",
      help="pixels, or one number for both (default: what SDXL was trained on)")
  add("--draw_steps", type=int, default=50, metavar="N", help="of the sampler (default: 50)")
  add("--draw_guidance", type=float, default=5.0, metavar="X",
      help="how much the prompt counts (default: 5)")
  add("--draw_seed", type=int, default=0, metavar="N",
      help="of the first picture's noise; the next has one more (default: 0)")
  add("--draw_force", action="store_true",
      help="begin the answer with <h>, so that the model writes a prompt in any case")
  add("--draw_memory", choices=("keep", "swap"), default="keep",
      help="keep both models on the devices, or swap: one at a time (default: keep)")
  args = parser.parse_args(argv)
  if args.draw is None:
    for name, value in vars(args).items():
      if name.startswith("draw_") and value != parser.get_default(name):
        parser.error(f"--{name} says how to draw, but there is nothing to draw with; give --draw "
                     "DIR too")
  return args


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


# Drawing.

class Drawer:
  """Paints what answers tell to.

  The settings are checked and the painter's folder is found at once; `join` brings a conversation,
  and the weights.  Raises ValueError or OSError.
  """

  def __init__(self, args: argparse.Namespace):
    from mgjax.diffusion.painter import Painting, open_painter
    self._gallery = Gallery(args.draw_to, "--draw_to")
    width, height = args.draw_size or (None, None)
    self._painting = Painting(width=width, height=height, steps=args.draw_steps,
                              guidance=args.draw_guidance, seed=args.draw_seed)
    self._painter = open_painter(args.draw)
    self._painter.check(self._painting)
    self.force, self._memory = args.draw_force, args.draw_memory

  def join(self, chat) -> None:
    """Paints beside that conversation's model from now on."""
    from mgjax.infer.studio import Studio
    self._studio = Studio(self._painter, chat.engine, memory=self._memory)
    if self._memory == "keep":
      with ticking("loading the painter"):
        self._studio.open()

  def paint(self, chat) -> None:
    """What the last answer tells to, if it does.  Raises PaintError, OSError, ImageError."""
    from mgjax.data.drawing.texts import PROMPT_START
    prompt = chat.drawing
    if prompt is None:
      begun = chat.turns[-1][1].startswith(PROMPT_START)  # and ended at once
      note("no picture: the model wrote no drawing prompt, <h>...</h>"
           + ("; say more of what to draw" if begun else "; /redraw makes it"))
      return
    if cut := self._painter.cut(prompt):
      note(f"longer than SDXL reads (77 tokens); it does not see the end: {cut}")
    begun = time.monotonic()
    with ticking(f"painting: {prompt}"):
      picture = self._studio.paint([prompt], self._painting)[0]
    self._painting = dataclasses.replace(self._painting, seed=(self._painting.seed + 1) % 2**32)
    height, width = picture.shape[:2]
    note(f"{self._gallery.save(picture)}: {width} x {height}, {time.monotonic() - begun:.1f} s")
    if chat.sees:
      # At the standard size: an HD view of every picture would soon fill the context.
      chat.attach(picture, hd=False)
      note("it goes with the next question; /drop leaves it out")


# The terminal.

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

def say(chat, question: str | None, drawer: Drawer | None = None) -> None:
  """Prints an answer as it comes, up to Ctrl-C; with a drawer, asks for a picture and paints it.

  question: None is the last one, for an answer that begins with its prompt.
  """
  if question is None:
    pieces = chat.ask_again(force=True)
  elif drawer is None:
    pieces = chat.ask(question)
  else:
    pieces = chat.ask(question, draw=True, force=drawer.force)
  show, stopped = writer(), False
  try:
    for piece in pieces:
      show(piece)
  except KeyboardInterrupt:
    pieces.close()
    show(" [stopped]")
    stopped = True
  print(flush=True)
  if chat.cut:
    note("cut: the answer reached the most tokens it may have")
  if drawer is not None and not stopped:
    drawer.paint(chat)


def obey(chat, line: str, args: argparse.Namespace, drawer: Drawer | None = None) -> bool:
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
  elif command in ("/draw", "/redraw"):
    draw(chat, command, rest, drawer)
  elif command.startswith("/"):
    raise ValueError(f"unknown command {command}; /help lists them")
  elif line:
    say(chat, line)
  return False


def draw(chat, command: str, words: str, drawer: Drawer | None) -> None:
  """What /draw and /redraw do.  Raises ValueError."""
  if drawer is None:
    raise ValueError(f"{command} needs something to draw with; start with --draw DIR, the folder "
                     "of a converted SDXL")
  if command == "/draw" and not words.strip():
    raise ValueError("draw what? /draw WORDS")
  say(chat, words if command == "/draw" else None, drawer)


def file_name(text: str) -> str:
  """A file as it is typed, or dropped onto a terminal: quoted, say.  ValueError if it is empty."""
  text = text.strip()
  if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
    text = text[1:-1]
  if not text:
    raise ValueError("which picture? /image FILE")
  return os.path.expanduser(text)


def converse(chat, args: argparse.Namespace, drawer: Drawer | None = None) -> None:
  """Reads questions line by line until /exit or the end of the input."""
  edit_lines()
  note("ask a question; /help lists the commands")
  ended = False
  while not ended:
    try:
      ended = obey(chat, input(prompt()).strip(), args, drawer)
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


def talk(args: argparse.Namespace) -> None:
  """All that the arguments ask for.  Raises what `expected_errors` lists."""
  drawer = Drawer(args) if args.draw is not None else None
  chat = open_chat(args)
  if drawer is not None:
    drawer.join(chat)
  if args.prompt is not None:
    say(chat, args.prompt, drawer)
  else:
    converse(chat, args, drawer)


def main(argv: list[str] | None = None) -> int:
  """The program; returns its exit code."""
  args = arguments(argv)
  return exit_code(lambda: talk(args), expected=expected_errors())


if __name__ == "__main__":
  sys.exit(main())
