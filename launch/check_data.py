"""Checks data before training: would it start, what is wrong with which sample, how full are rows.

    python launch/check_data.py --config=configs/stage2.py:mgm-7b --report=work_dirs/data_check \
        --config.tokenizer=checkpoints/start-7b/tokenizer

Takes the config of launch/train.py and looks at the same data with the same rules.  The report
folder gets report.html, problems.jsonl (a line for each finding) and summary.json.

Exit status: 0 if training would start and meet none of the bad samples that were found, 1 if not, 2
if the command or the config is wrong, so that nothing was checked.
"""
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file, e.g. configs/stage1.py")
_REPORT = flags.DEFINE_string("report", None, "folder of the report; made if it is missing")
_IMAGES = flags.DEFINE_enum(
    "images", "headers", ["headers", "decode", "none"],
    "pictures: read their headers, decode them whole (slow), or do not look for them")
flags.mark_flags_as_required(["config", "report"])


def main(argv):
  if argv[1:]:
    raise app.UsageError(f"unexpected arguments {argv[1:]}", exitcode=2)
  from mgjax.checkpoint import CheckpointError
  from mgjax.command import last_line
  from mgjax.config import ConfigError
  from mgjax.data.samples import DataError
  try:
    values = _CONFIG.value.to_dict()
  except OSError as e:  # a config file that is not there is told of when it is first used
    return stop(f"--config: {last_line(e)}")
  try:
    return check(values, Path(_REPORT.value), _IMAGES.value)
  except DataError as e:
    return stop(e, 1)
  except (ConfigError, CheckpointError, OSError) as e:
    logging.debug("where it came from", exc_info=True)  # --verbosity=1 shows it
    return stop(e)


def check(values: dict, folder: Path, images: str) -> int:
  from tqdm import tqdm

  from mgjax.config import ConfigError
  from mgjax.data.doctor.examine import FILES, examine, write_report
  from mgjax.data.doctor.page import text
  from mgjax.data.tokenizer import load_tokenizer
  from mgjax.train.config import run_config
  from mgjax.train.loop import check_vocabulary, tokenizer_folder

  if "runs" in values:
    raise ConfigError("--config is a recipe of several runs, which makes its own data; expected a "
                      "run, e.g. configs/stage2.py")
  config = run_config(values)
  tokenizer = load_tokenizer(tokenizer_folder(config, folder))  # of a report in a run: the run's
  check_vocabulary(tokenizer, config)
  folder.mkdir(parents=True, exist_ok=True)
  for name in FILES:  # of an earlier check: they would look like this one's if it ends early
    (folder / name).unlink(missing_ok=True)
  with tqdm(unit=" samples", unit_scale=True, desc="opening", mininterval=0.5,
            disable=None) as bar:  # None: not in a log

    def show(done: int, total: int) -> None:
      bar.total = total
      bar.set_description("looking", refresh=False)
      bar.update(done - bar.n)

    found = examine(config.data, tokenizer, images=images, progress=show,
                    processes=config.data.workers or os.cpu_count())
  report = write_report(found, folder)
  sys.stdout.reconfigure(errors="backslashreplace")
  print(text(report))
  print(f"\n{folder / FILES[0]}")
  return 0 if report.verdict.ok else 1


def stop(why: object, status: int = 2) -> int:
  print(f"error: {why}", file=sys.stderr)
  return status


if __name__ == "__main__":
  from mgjax.command import parser
  app.run(main, flags_parser=parser(2))
