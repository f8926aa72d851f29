"""Trains.  One run, or a recipe of several (configs/demo.py), from a config file.

    python launch/train.py --config=configs/stage2.py:mgm-7b --workdir=work_dirs/mgm-7b \
        --config.data.batch_size=64 --config.mesh.tensor=4

A workdir that exists is resumed.  SIGTERM saves and exits with 0.

The same command on every host of a TPU pod trains over all of them (docs/tpu.md).  Elsewhere, on
each of N machines, the first being host 0:

    python launch/train.py ... --coordinator=ADDRESS_OF_HOST_0:8476 --hosts=N --host=I
"""
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file, e.g. configs/stage1.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; resumed if it exists")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT where the hosts meet: host 0's")
_HOSTS = flags.DEFINE_integer("hosts", 0, "how many processes train, with --coordinator")
_HOST = flags.DEFINE_integer("host", -1, "which one this is, from 0")
_DISTRIBUTED = flags.DEFINE_bool("distributed", None, "join the hosts that jax detects (Slurm, "
                                 "Open MPI, GKE); by default those of a TPU pod; --nodistributed: "
                                 "this host alone")
_JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 120, "seconds to wait for the other hosts", 1)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
  if argv[1:]:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  from mgjax.checkpoint import CheckpointError
  from mgjax.command import last_line
  from mgjax.config import ConfigError
  from mgjax.data.samples import DataError
  from mgjax.evaluate.benchmark import EvaluationError
  from mgjax.train.config import run_config
  from mgjax.train.hosts import joined
  from mgjax.train.loop import TrainingError, train

  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
  try:
    values = _CONFIG.value.to_dict()
  except OSError as e:  # a config file that is not there is told of when it is first used
    sys.exit(f"error: --config: {last_line(e)}")
  mistakes = (ConfigError, DataError, CheckpointError, EvaluationError, TrainingError, OSError)
  try:
    run = None if "runs" in values else run_config(values)
    with joined(coordinator=_COORDINATOR.value, hosts=_HOSTS.value, host=_HOST.value,
                detect=_DISTRIBUTED.value, timeout=_JOIN_TIMEOUT.value, mistakes=mistakes):
      if run is None:
        from mgjax.demo.recipe import run_demo
        run_demo(values, _WORKDIR.value)
      else:
        train(run, _WORKDIR.value)
  except mistakes as e:
    logging.debug("where it came from", exc_info=True)  # --verbosity=1 shows it
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  from mgjax.command import parser
  app.run(main, flags_parser=parser())
