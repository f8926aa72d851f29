"""Makes the generation subset: text records that teach a model to write a diffusion prompt.

A language model behind an OpenAI-compatible endpoint (client.py) is given captions or
conversations (inputs.py), and its replies become records (texts.py).  The output
folder holds

  generation.json   the records, LLaVA JSON in the order of the inputs; written once all are asked
  replies.jsonl     every usable reply, as it came: what is here is not asked again
  failed.jsonl      inputs without a usable reply, with the reason; asked again with `retry_failed`
  skipped.jsonl     unusable inputs that `on_error` = skip left out
  state.json        calls, tokens and money, over all runs
"""
from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

from mgjax.config import ConfigError, at_least
from mgjax.data.drawing.inputs import read_examples, read_inputs
from mgjax.data.drawing.texts import EXAMPLES, Job, Reply, make_record, messages_for, read_reply
from mgjax.data.journal import Journal, JournalError, sole_user, write_whole
from mgjax.data.samples import DataError
from mgjax.endpoint.client import Endpoint, EndpointConfig, EndpointError, Refused
from mgjax.endpoint.pacing import Clock, Stopped

RECORDS = "generation.json"
_REFUSALS = 20         # in a row, and with no answer before: it is not the texts
_FREE_BYTES = 1 << 20  # what must be left on the disk before a reply is paid for
_GRACE = 20.0          # seconds that requests under way get to end on a stop
_REPORT = 15.0         # seconds between two lines of progress


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
  """What is made of what.

  captions: JSON list or lines of {"id", "caption"}, or LLaVA JSON whose only answer is the caption.
  contexts: LLaVA JSON, text only.  examples: a file of prompts, one a line; "" = those built in.
  """

  output: str
  captions: str = ""
  contexts: str = ""
  examples: str = ""
  shots: int = 5                     # examples that each request shows
  words: tuple[int, int] = (8, 55)   # least and most of a prompt
  retries: int = 2                   # further requests after an unusable reply
  retry_failed: bool = False
  on_error: str = "stop"             # or skip: what to do with unusable inputs
  concurrency: int = 8
  seed: int = 0

  def __post_init__(self):
    at_least(self, 0, "shots", "retries")
    at_least(self, 1, "concurrency")
    if not (self.captions or self.contexts):
      raise ConfigError("nothing to make prompts of: give captions, contexts, or both")
    if not 1 <= self.words[0] <= self.words[1]:
      raise ConfigError(f"words is {self.words}, expected least and most words of a prompt")
    if self.on_error not in ("stop", "skip"):
      raise ConfigError(f"on_error is {self.on_error!r}, expected stop or skip")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How far a run came: inputs by what became of them, over all runs."""

  made: int
  failed: int
  skipped: int
  left: int      # not asked yet
  why: str = ""  # what stopped the run, where some are left


def make_prompts(config: PromptsConfig, endpoint: EndpointConfig, *, clock: Clock = Clock(),  # noqa: B008
                 report: Callable[[str], None] = print) -> Outcome:
  """Asks for what is missing in `config.output`; once nothing is, writes generation.json.

  May be stopped at any time and called again.  SIGINT and SIGTERM let requests under way end, a
  second one does not wait for them; these and the budget are told in the Outcome.  Not for use
  inside a running event loop.

  Raises ConfigError, DataError (inputs), EndpointError, JournalError or OSError (the disk); what
  was done until then is kept.
  """
  jobs, problems = read_inputs(config.captions, config.contexts)
  total = len(jobs) + len(problems)
  if problems and (config.on_error == "stop" or not jobs):
    raise DataError.of(problems, total, "Mend them, or leave out such ones with --on-error skip.")
  examples = read_examples(config.examples) if config.examples else EXAMPLES
  folder = pathlib.Path(config.output)
  with sole_user(folder), contextlib.closing(Journal(folder / "replies.jsonl")) as replies, \
      contextlib.closing(Journal(folder / "failed.jsonl")) as failures:
    write_whole(folder / "skipped.jsonl", "".join(
        json.dumps(dataclasses.asdict(p)) + "\n" for p in problems))
    made = _replies_in(replies)
    old = len(failures.entries) if config.retry_failed else 0  # those before do not count
    failed = {_key(entry) for entry in failures.entries[old:]}
    todo = [job for job in jobs if job.key not in made and job.key not in failed]
    report(f"{total:,} inputs: {sum(job.key in made for job in jobs):,} made before, "
           f"{len(todo):,} to ask, {len(problems):,} unusable")
    why = ""
    if todo:
      endpoint = dataclasses.replace(
          endpoint, body={"response_format": {"type": "json_object"}} | dict(endpoint.body))
      run = _Run(config, examples, Endpoint(endpoint, folder / "state.json", clock), replies,
                 failures, report, len(todo))
      why = asyncio.run(run.all(todo))
      made = _replies_in(replies)
      failed = {_key(entry) for entry in failures.entries[old:]}
    records = [make_record(job, made[job.key]) for job in jobs if job.key in made]
    lost = sum(job.key in failed and job.key not in made for job in jobs)
    outcome = Outcome(len(records), lost, len(problems), len(jobs) - len(records) - lost, why)
    if not outcome.left:
      _write_records(folder, records, lost)
      report(f"{folder / RECORDS}: {len(records):,} records; {lost:,} inputs failed "
             f"(failed.jsonl), {len(problems):,} skipped (skipped.jsonl)")
  return outcome


def _key(entry: dict) -> tuple[str, str, str]:
  try:
    return entry["recipe"], entry["id"], entry["input"]
  except KeyError as error:
    raise JournalError(f"a line of replies.jsonl or failed.jsonl lacks {error}; it is none of this "
                       "tool's: give another --output") from error


def _replies_in(journal: Journal) -> dict[tuple[str, str, str], Reply]:
  try:
    return {_key(entry): Reply(**entry["reply"]) for entry in journal.entries}
  except (KeyError, TypeError) as error:
    raise JournalError(f"{journal.path}: no journal of replies ({error}); give another --output"
                       ) from error


def _write_records(folder: pathlib.Path, records: Sequence[dict], failed: int) -> None:
  if not records:
    raise DataError(f"{folder}: none of {failed:,} inputs has a usable reply, failed.jsonl says "
                    "why; another --model may do better, with --retry-failed")
  lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
  write_whole(folder / RECORDS, f"[\n{lines}\n]\n")


class _Run:
  """One event loop's worth of asking."""

  def __init__(self, config: PromptsConfig, examples: Sequence[str], endpoint: Endpoint,
               replies: Journal, failures: Journal, report: Callable[[str], None], total: int):
    self._config, self._examples, self._endpoint = config, examples, endpoint
    self._replies, self._failures, self._report, self._total = replies, failures, report, total
    self._made = self._failed = 0
    self._answered = False
    self._refused: list[tuple[Job, str]] = []  # until an answer shows that others are taken
    self._reason: BaseException | None = None
    self._workers: list[asyncio.Task] = []
    self._told = 0.0

  async def all(self, jobs: Sequence[Job]) -> str:
    """Asks for all jobs; returns why some are left, "" if none is.  Raises what ended it."""
    queue = iter(jobs)
    self._told = asyncio.get_running_loop().time()
    async with self._endpoint:
      self._workers = [asyncio.create_task(self._work(queue))
                       for _ in range(min(self._config.concurrency, len(jobs)))]
      with _on_signals(self._signalled):
        await asyncio.wait(self._workers)
    if self._refused and not self._reason:
      if self._replies.entries:  # the last few of a run that was stopped
        self._settle_refused()
      else:
        self._reason = self._refusal()
    self._report(self._progress())
    if isinstance(self._reason, Stopped):
      return str(self._reason)
    if self._reason:
      raise self._reason
    return ""

  async def _work(self, queue: Iterator[Job]) -> None:
    try:
      for job in queue:
        await self._one(job)
        if self._reason:
          return
    except Exception as error:
      self._stop(error)

  async def _one(self, job: Job) -> None:
    """Asks until a reply is usable, and writes down what came of it."""
    free = shutil.disk_usage(self._replies.path.parent).free
    if free < _FREE_BYTES:
      raise OSError(errno.ENOSPC, f"only {free:,} bytes are free, nothing more is asked; what was "
                    "done before is kept", str(self._replies.path.parent))
    reason = text = ""
    for attempt in range(self._config.retries + 1):
      messages = messages_for(job, self._config.words, self._examples, self._config.shots,
                              self._config.seed, attempt, reason)
      try:
        answer = await self._endpoint.ask(messages, self._config.seed + attempt)
      except Refused as error:
        self._refused.append((job, str(error)))
        if self._answered:
          self._settle_refused()
        elif len(self._refused) >= _REFUSALS:
          raise self._refusal() from error
        return
      text, self._answered = answer.text, True
      try:
        if answer.finish in ("length", "content_filter", "refusal"):
          raise ValueError(f"it ended with {answer.finish}")
        reply = read_reply(text, self._config.words)
      except ValueError as error:
        reason = str(error)
        continue
      self._replies.append({**_entry(job), "model": self._endpoint.config.model,
                            "reply": dataclasses.asdict(reply)})
      self._made += 1
      break
    else:
      self._fail(job, reason, text)
    self._settle_refused()
    self._tell()

  def _settle_refused(self) -> None:
    """The endpoint takes others: what it refused is at fault itself."""
    while self._refused:
      self._fail(*self._refused.pop(0))

  def _refusal(self) -> EndpointError:
    return EndpointError(f"the endpoint takes none of {len(self._refused)} requests "
                         f"({self._refused[0][1]}); --body can change or leave out what is sent, "
                         "or the first inputs are at fault: take them out")

  def _fail(self, job: Job, reason: str, text: str = "") -> None:
    text = text[:500].encode(errors="replace").decode()  # half a character cannot be written
    self._failures.append({**_entry(job), "file": job.file, "index": job.index, "reason": reason,
                           "reply": text})
    self._failed += 1

  def _signalled(self, name: str) -> None:
    if self._reason:  # the second time: at once
      for worker in self._workers:
        worker.cancel()
      return
    self._report(f"{name}: ending the requests under way")
    self._stop(Stopped(name))

  def _stop(self, reason: BaseException) -> None:
    """No more requests; those under way may end, for a while."""
    self._reason = self._reason or reason
    self._endpoint.closed = True
    for worker in self._workers:
      if worker not in self._endpoint.calling and worker is not asyncio.current_task():
        worker.cancel()
      elif not isinstance(reason, OSError):
        asyncio.get_running_loop().call_later(_GRACE, worker.cancel)
      else:  # their replies could not be kept
        worker.cancel()

  def _progress(self) -> str:
    spent = self._endpoint.ledger.spent
    cost = f", cost {spent.cost:.4f}" if spent.cost else ""
    unsure = f" ({spent.unsure} calls at the most they can have used)" if spent.unsure else ""
    return (f"{self._made + self._failed:,} of {self._total:,} asked, {self._failed:,} failed; "
            f"in all {spent.calls:,} calls, {spent.prompt_tokens:,} + {spent.completion_tokens:,} "
            f"tokens{cost}{unsure}")

  def _tell(self) -> None:
    now = asyncio.get_running_loop().time()
    if now - self._told > _REPORT:
      self._told = now
      self._report(self._progress())


def _entry(job: Job) -> dict:
  recipe, name, digest = job.key
  return {"recipe": recipe, "id": name, "input": digest}


@contextlib.contextmanager
def _on_signals(call: Callable[[str], None]) -> Iterator[None]:
  """SIGINT and SIGTERM call, in the main thread; elsewhere they are left alone."""
  loop, names = asyncio.get_running_loop(), ()
  if threading.current_thread() is threading.main_thread():
    names = (signal.SIGINT, signal.SIGTERM)
  for name in names:
    loop.add_signal_handler(name, call, name.name)
  try:
    yield
  finally:
    for name in names:
      loop.remove_signal_handler(name)
