"""Several hosts train one model: they join, stop at the same step, and end when one is lost."""
from __future__ import annotations

import contextlib
import glob
import importlib.util
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mgjax.config import ConfigError
from mgjax.sharding import batch_sharding, batch_shards
from mgjax.train import watcher

HEARTBEAT = 60  # seconds; jax's own watch over the hosts, where ours does not reach
STARTING = 3600.0  # seconds that reading the data, restoring or compiling may take


# Joining.


@contextlib.contextmanager
def joined(*, coordinator: str = "", hosts: int = 0, host: int = -1, detect: bool | None = None,
           timeout: int = 120, mistakes: tuple[type[Exception], ...] = ()) -> Iterator[None]:
  """Joins the other hosts of this run, if there are any, for the body.

  coordinator: "HOST:PORT" of host 0, with the number of `hosts` and which one this is.  Without,
  detect: True, whatever jax detects (TPU pods, GKE, Slurm, Open MPI); None, a TPU pod if this is
  one; False, one host.  Raises ConfigError for what does not fit together.

  Among several hosts, this process ends with status 1 when the others cannot be reached within
  `timeout` seconds, with one line, and when the body raises, with one line for what is among
  `mistakes`: jax would abort with a stack trace, or wait for the others first.
  """
  if coordinator or hosts or host >= 0:
    check_address(coordinator, hosts, host)
    where = dict(coordinator_address=coordinator, num_processes=hosts, process_id=host,
                 cluster_detection_method="deactivate")
  elif detect or (detect is None and is_tpu_pod()):
    where = {}
  else:
    yield
    return
  join(where, timeout)
  try:
    yield
  except mistakes as e:
    logging.debug("where it came from", exc_info=True)
    _end(f"error: {e}")
  except BaseException:
    _end(traceback.format_exc())


def check_address(coordinator: str, hosts: int, host: int) -> None:
  """Raises ConfigError unless the three say where the hosts meet and which one this is."""
  name, _, port = coordinator.rpartition(":")
  if not name or not port.isdigit():
    raise ConfigError(f"--coordinator is {coordinator!r}; expected HOST:PORT of host 0, beside "
                      "--hosts and --host")
  if hosts < 1:
    raise ConfigError(f"--hosts is {hosts}; expected how many processes there are, with "
                      "--coordinator and --host")
  if not 0 <= host < hosts:
    raise ConfigError(f"--host is {host}; expected which one this is, 0 to {hosts - 1}")


def is_tpu_pod() -> bool:
  """Whether this machine is one of several of a TPU slice, or of several slices.

  Asks nobody unless there is a TPU in this machine, and then for no more than 3 seconds.
  """
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if not chips or not importlib.util.find_spec("libtpu") or (
      platforms and "tpu" not in platforms.split(",")):
    return False
  # GKE tells by variables, a TPU VM by its metadata server.
  workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
  slices = os.environ.get("MEGASCALE_NUM_SLICES")
  if workers is None:
    workers = _metadata("worker-network-endpoints")
    for line in _metadata("tpu-env").splitlines():
      key, _, value = line.partition(":")
      if key.strip() == "MEGASCALE_NUM_SLICES" and not slices:
        slices = value.strip(" '\"")
  return len(workers.split(",")) > 1 or int(slices or 1) > 1


def _metadata(key: str) -> str:
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
                                   headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=3) as answer:
      return answer.read().decode()
  except (OSError, ValueError):  # not there, or not of Google
    return ""


def join(where: dict[str, Any], timeout: int) -> None:
  """jax.distributed.initialize(**where); ends the process when that takes more than `timeout`."""
  address = where.get("coordinator_address", "")
  reached = threading.Event()
  if address and where["process_id"]:
    _reach(address, timeout)

  def late():
    if not reached.is_set():
      _end(f"error: waited {timeout} s for the other hosts" + (
          f", of which there should be {where['num_processes']}, at {address}" if address else "") +
          "; see that each was started, with its own --host, and can reach host 0")
  timer = threading.Timer(timeout, late)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(**where, initialization_timeout=timeout + 60,
                               heartbeat_timeout_seconds=HEARTBEAT,
                               shutdown_timeout_seconds=HEARTBEAT)
  except (RuntimeError, ValueError) as e:
    _end(f"error: cannot join the other hosts{f' at {address}' if address else ''}: "
         f"{(str(e).splitlines() or [type(e).__name__])[0]}")
  finally:
    reached.set()
    timer.cancel()


def _reach(address: str, timeout: int) -> None:
  """Returns when somebody listens at `address`; else ends the process."""
  host, _, port = address.rpartition(":")
  end, why = time.monotonic() + timeout, ""
  while time.monotonic() < end:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as e:
      why = str(e)
      time.sleep(min(1.0, max(0.0, end - time.monotonic())))
  _end(f"error: --coordinator {address} could not be reached for {timeout} s ({why}); start host 0 "
       "there, or open the port")


def _end(line: str) -> None:
  if line:
    print(line, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)  # the ordinary way out waits for the other hosts


# Stopping at the same step.


@contextlib.contextmanager
def stop_notice() -> Iterator[Callable[[], bool]]:
  """A function to call wherever a run could stop, in every host at the same places: whether to
  save and stop here, since SIGTERM came to any of the hosts; all get the same answer.

  Several hosts agree in the background (jax listens for the signal and finds a place that none of
  them has reached): asking costs no communication.
  """
  if jax.process_count() > 1:
    places = itertools.count()  # their numbers, which have to follow each other
    yield lambda: multihost_utils.reached_preemption_sync_point(next(places))
    return
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event.is_set  # a notebook's worker thread: nobody sends it signals
    return
  before = signal.signal(signal.SIGTERM, lambda *_: event.set())
  try:
    yield event.is_set
  finally:
    signal.signal(signal.SIGTERM, before)


def word(mesh: Mesh, failed: bool) -> jax.Array:
  """What this host tells the others along with a step: int32 [shards of the batch], 1 + its number
  if it cannot take the step after, else 0.  The largest of all is what the step gives back."""
  mine = np.full(batch_shards(mesh) // jax.process_count(), failed * (1 + jax.process_index()),
                 np.int32)
  return jax.make_array_from_process_local_data(batch_sharding(mesh), mine)


# Ending when one is lost.


class Watch:
  """Tells the watcher beside this process how far it is.  One host: nobody listens."""

  def __init__(self, limit: float):
    self._limit, self._place, self._step = limit, 0, 0
    self._now = ("starting", time.monotonic(), STARTING)

  def at(self, doing: str, *, step: int | None = None, limit: float | None = None) -> None:
    """This host begins `doing`, as the others do or will; `step` is done.  Past `limit` seconds
    (default: that of a step), who has not got past it is taken for hung."""
    self._place += 1
    self._step = self._step if step is None else step
    self._now = (doing, time.monotonic(), limit or self._limit)

  def failed(self, error: BaseException) -> None:
    """This host stops on `error`; the others shall hear why."""

  def message(self) -> dict[str, Any]:
    """A sign of life."""
    doing, since, limit = self._now
    return dict(doing=doing, age=time.monotonic() - since, limit=limit, place=self._place,
                step=self._step)


class _Watched(Watch):
  """Several hosts.  Two threads: one gives signs of life, one hears the verdict."""

  def __init__(self, limit: float):
    super().__init__(limit)
    me, name = jax.process_index(), f"{socket.gethostname()}, pid {os.getpid()}"
    self._process = subprocess.Popen(
        [sys.executable, "-I", "-S", watcher.__file__], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True)
    self._lock, self._ended, self._failed = threading.Lock(), threading.Event(), None
    hello = dict(host=me, name=name, pid=os.getpid(), address=_own_address(),
                 token=secrets.token_hex(16))
    if me == 0:
      self._say(hello)
      hello["port"] = json.loads(self._process.stdout.readline())["port"]
    first = _from_host_0(hello)
    if me != 0:
      self._say(hello | dict(judge=[first["address"], first["port"]], judge_name=first["name"],
                             token=first["token"]))
    for run in (self._beat, self._listen):
      threading.Thread(target=run, name=f"hosts{run.__name__}", daemon=True).start()

  def _say(self, message: dict) -> None:
    with self._lock, contextlib.suppress(OSError):  # a watcher that is gone hears nothing
      self._process.stdin.write(json.dumps(message) + "\n")
      self._process.stdin.flush()

  def _beat(self) -> None:
    while not self._ended.is_set():
      self._say(self.message())
      self._ended.wait(watcher.BEAT)

  def _listen(self) -> None:
    for line in self._process.stdout:
      message = json.loads(line)
      if "warn" in message:
        logging.warning("%s", message["warn"])
      if "end" in message:
        _end(f"\nerror: {message['end']}")  # the progress line has no end

  def failed(self, error: BaseException) -> None:
    if self._failed is None:
      text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:500]}"
      # A computation that fails on one host may be all that it sees of another host's end.
      maybe_another = isinstance(error, jax.errors.JaxRuntimeError)
      self._failed = dict(failed=text, maybe_another=maybe_another)
      self._say(self.message() | self._failed)

  def close(self) -> None:
    """Leaves; host 0 is the last to go."""
    if self._failed is not None and self._failed["maybe_another"]:
      traceback.print_exc()
      time.sleep(watcher.SILENT + 2 * watcher.GRACE)  # the verdict ends this process
    self._ended.set()
    self._say({"left": True})
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(watcher.LINGER + watcher.GRACE)


@contextlib.contextmanager
def watched(limit: float) -> Iterator[Watch]:
  """Watches the hosts over each other while the body runs.

  A process that ends without a word, a host that gives no sign of life for 40 seconds, a failure,
  or a host that takes longer than `limit` seconds over a part of a step, ends all of them with one
  line that names it, and status 1.
  """
  if jax.process_count() == 1:
    yield Watch(limit)
    return
  watch = _Watched(limit)
  try:
    yield watch
  except BaseException as e:
    watch.failed(e)
    raise
  finally:
    watch.close()


def _own_address() -> str:
  """Where other machines reach this one."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    try:
      s.connect(("192.0.2.1", 9))  # sends nothing; only asks which way it would go
      return s.getsockname()[0]
    except OSError:
      return socket.gethostname()


def _from_host_0(value: dict) -> dict:
  """`value` as host 0 has it."""
  room = np.zeros(1024, np.uint8)
  text = json.dumps(value).encode()
  room[:len(text)] = np.frombuffer(text, np.uint8)
  return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))).rstrip(b"\0"))
