"""Watches over the hosts of one run, from a process of its own beside each of them.

A process that is killed, aborted deep inside the runtime, or stuck, can tell nobody; its watcher
can.  `mgjax.train.hosts` starts one beside each training process and speaks with it in lines of
JSON.  The watchers of the other hosts pass on what they hear to that of host 0, which judges; what
it finds wrong ends the training processes of all hosts, and is the last line that each prints.

Only the standard library: it must not share the fate of what it watches.
"""
from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time

BEAT = 2.0  # seconds between two signs of life
SILENT = 40.0  # without a sign of life for so long, a host is lost
QUIET = 10.0  # ... and is suspected when another ends
GRACE = 5.0  # for the others to end by themselves when one has failed: often all fail alike
SETTLE = 1.0  # one death brings others; so long the first one is sought
LINGER = 10.0  # host 0's watcher is there for the others when its own process is done


@dataclasses.dataclass
class Host:
  """What is known of a host.  Times are of time.monotonic()."""

  name: str
  heard: float                # its last sign of life
  place: int = 0              # how many things it has begun
  doing: str = ""             # the last of them,
  since: float = 0.0          # begun then,
  limit: float = float("inf")  # which takes no longer than so many seconds
  failed: str = ""            # what it said that stopped it,
  failed_at: float = 0.0
  maybe_another: bool = False  # ... which may be what another host's end looks like from there
  gone_at: float | None = None  # its process was seen to end without having said so
  left: bool = False          # it ended, and said so

  def hear(self, message: dict, now: float) -> None:
    """Takes in a message of the host's process."""
    self.heard = now
    if "doing" in message:
      self.place, self.doing, self.limit = message["place"], message["doing"], message["limit"]
      self.since = now - message["age"]
    if "failed" in message:
      self.failed, self.failed_at = message["failed"], now
      self.maybe_another = message["maybe_another"]
    if "left" in message:
      self.left = True
    if "gone" in message and self.gone_at is None and not self.left:
      self.gone_at = now


def verdict(hosts: dict[int, Host], now: float) -> str:
  """What ends the run, naming the host; "" while nothing does."""
  name = lambda h: f"host {h} ({hosts[h].name})"
  gone = [h for h, s in sorted(hosts.items()) if s.gone_at is not None]
  if gone and now - min(hosts[h].gone_at for h in gone) >= SETTLE:
    # Communication that waits in vain aborts too, so it was perhaps for one that is silent.
    if quiet := [h for h, s in hosts.items() if s.gone_at is None and not s.left and
                 now - s.heard > QUIET]:
      return f"{name(quiet[0])} did not answer for {now - hosts[quiet[0]].heard:.0f} s"
    # jax ends everybody when host 0 is gone, so it is the cause if it is among them.
    first = gone[0] if gone[0] == 0 else min(gone, key=lambda h: hosts[h].gone_at)
    return f"the process of {name(first)} ended without a word (killed, or out of memory?)"
  for h, s in hosts.items():
    if s.failed and not s.maybe_another and now - s.failed_at >= GRACE:
      return f"{name(h)} stopped: {s.failed}"
  here = {h: s for h, s in hosts.items() if not s.left}
  for h, s in here.items():
    if now - s.heard >= SILENT:
      return f"{name(h)} did not answer for {now - s.heard:.0f} s"
  failed = [h for h, s in hosts.items() if s.failed]
  if failed:
    first = min(failed, key=lambda h: hosts[h].failed_at)
    late = now - hosts[first].failed_at >= SILENT + GRACE
    return f"{name(first)} stopped: {hosts[first].failed}" if late else ""
  if any(s.doing and now - s.since > s.limit for s in here.values()):
    # The others wait in their next common computation for the one that is furthest behind.
    last = min(here, key=lambda h: here[h].place)
    behind = [h for h in here if here[h].place == here[last].place]
    stuck = f"'{here[last].doing}' for {now - here[last].since:.0f} s"
    if len(behind) == len(here) > 1:
      return f"no host has got past {stuck}"
    return f"{' and '.join(map(name, behind))} did not get past {stuck}"
  return ""


class Watcher:
  """One host's watcher.  `run` returns when there is nothing left to watch."""

  def __init__(self, hello: dict, out):
    self._me, self._pid, self._token = hello["host"], hello["pid"], hello["token"]
    self._name, self._out = hello["name"], out
    self._step = "none"
    now = time.monotonic()
    self._own = Host(hello["name"], now)
    self._hosts = {self._me: self._own}
    self._others: dict[int, asyncio.StreamWriter] = {}  # host 0: those that are connected
    self._judge = Host(hello.get("judge_name", ""), now)  # elsewhere: host 0's watcher
    self._to_judge: asyncio.StreamWriter | None = None
    self._found, self._over, self._process_ended = "", False, False

  def _say(self, **message) -> None:
    with contextlib.suppress(OSError):
      print(json.dumps(message), file=self._out, flush=True)

  # What comes in.

  async def hear_process(self, reader: asyncio.StreamReader) -> None:
    """Reads what the own process says, until it ends."""
    async for line in reader:
      message = json.loads(line)
      self._step = message.get("step", self._step)
      self._pass_on(message)
    self._process_ended = True
    self._pass_on({"gone": True})

  def _pass_on(self, message: dict) -> None:
    self._own.hear(message, time.monotonic())
    if self._to_judge is not None:
      _send(self._to_judge, message)

  async def hear_other(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Host 0: one connection, from its first line on; whoever has not the token is sent away."""
    host = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, TimeoutError):
      hello = json.loads(await asyncio.wait_for(reader.readline(), 10))
      if hello["token"] == self._token:
        host = self._hosts[hello["host"]] = Host(hello["name"], time.monotonic())
        self._others[hello["host"]] = writer
        async for line in reader:
          host.hear(json.loads(line), time.monotonic())
    if host is not None:
      host.hear({"gone": True}, time.monotonic())
    writer.close()

  async def hear_judge(self, reader: asyncio.StreamReader) -> None:
    """Elsewhere: what host 0's watcher says, until it ends."""
    with contextlib.suppress(OSError):
      async for line in reader:
        message = json.loads(line)
        self._judge.heard = time.monotonic()
        self._found = self._found or message.get("verdict", "")
        self._over = self._over or "over" in message
    self._judge.hear({"gone": True}, time.monotonic())

  # What goes on.

  async def run(self) -> None:
    """Watches until the run is over or somebody has to be told."""
    judging, last, beat, left_at = self._me == 0, time.monotonic(), 0.0, None
    while not self._found and not self._over:
      await asyncio.sleep(0.2)
      now = time.monotonic()
      if now - last > 10:  # this machine was paused: nobody could be heard
        for host in (*self._hosts.values(), self._judge):
          host.heard += now - last
      last = now
      if judging:
        self._found = verdict(self._hosts, now)
      else:
        self._found = self._found or verdict({0: self._judge}, now)
      if now - beat > BEAT:
        beat = now
        for writer in self._others.values():
          _send(writer, {"ok": True})
      if self._own.left:
        left_at = left_at or now
        waiting = any(not s.left and s.gone_at is None for s in self._hosts.values())
        if not judging or not waiting or now - left_at > LINGER:
          break
    for writer in self._others.values():
      _send(writer, {"verdict": self._found} if self._found else {"over": True})
    for writer in (*self._others.values(), self._to_judge):
      if writer is not None:
        with contextlib.suppress(OSError, TimeoutError):
          await asyncio.wait_for(writer.drain(), 2)
    if self._found and not self._own.left:
      await self._end_process()

  async def _end_process(self) -> None:
    line = (f"{self._found}; last step done here: {self._step}; start again with the same "
            "--workdir to go on")
    if not self._process_ended:
      if self._own.failed and not self._own.maybe_another:
        # It is ending already, and may have a checkpoint to finish.
        await self._until_ended(LINGER)
      self._say(end=line)
      if await self._until_ended(GRACE):
        return  # it has printed the line
      with contextlib.suppress(ProcessLookupError):
        os.kill(self._pid, signal.SIGKILL)  # stopped, or stuck in a call
    print(f"\nerror: {line}", file=sys.stderr, flush=True)  # the progress line has no end

  async def _until_ended(self, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not self._process_ended and time.monotonic() < end:
      await asyncio.sleep(0.05)
    return self._process_ended

  async def hang_up(self) -> None:
    """Host 0: ends the connections."""
    for writer in self._others.values():
      writer.close()
    await asyncio.sleep(0.1)  # whoever hears them sees that they have ended

  async def connect(self, address: list, hello: dict) -> asyncio.StreamReader | None:
    """Elsewhere: to host 0's watcher; None, and a warning, if it cannot be reached."""
    try:
      reader, self._to_judge = await asyncio.wait_for(asyncio.open_connection(*address), 30)
    except (OSError, TimeoutError) as e:
      self._say(warn=f"the hosts do not watch each other: {address[0]}:{address[1]} on host 0 "
                     f"cannot be reached from here ({type(e).__name__}: {e}); open the ports "
                     "between the hosts, or a host that hangs will hang them all")
      return None
    _send(self._to_judge, {k: hello[k] for k in ("token", "host", "name")})
    self._judge.heard = time.monotonic()
    return reader


def _send(writer: asyncio.StreamWriter, message: dict) -> None:
  if not writer.is_closing():
    writer.write(json.dumps(message).encode() + b"\n")


async def main() -> None:
  """The first line in is of `hello`; host 0's watcher answers with the port that it listens at."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # meant for the process that it watches
  stdin = asyncio.StreamReader()
  await asyncio.get_running_loop().connect_read_pipe(
      lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
  hello = json.loads(await stdin.readline())
  watcher = Watcher(hello, sys.stdout)
  if hello["host"] == 0:
    server = await asyncio.start_server(watcher.hear_other, hello["address"], 0)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    heard = []
  else:
    judge = await watcher.connect(hello["judge"], hello)
    if judge is None:
      return
    heard = [asyncio.create_task(watcher.hear_judge(judge))]
  heard.append(asyncio.create_task(watcher.hear_process(stdin)))
  await watcher.run()
  for task in heard:
    task.cancel()
  await watcher.hang_up()


if __name__ == "__main__":
  asyncio.run(main())
