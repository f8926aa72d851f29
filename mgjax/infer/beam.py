"""Beam search: the likeliest of many answers, or one drawn from them (R6, MMMU)."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mgjax.infer.engine import Engine, Prompt
from mgjax.infer.sampling import Sampling


def beam_search(engine: Engine, prompt: Prompt, *, beams: int, max_new_tokens: int,
                stop_ids: Sequence[int] = (), temperature: float = 0.0, length_penalty: float = 1.0,
                seed: int = 0) -> tuple[list[int], float]:
  """The best answer found, its stop id included if it met one, and its score.

      score = (sum of the log-probabilities of its tokens) / (their number) ** length_penalty

  As Hugging Face's `generate(num_beams=...)` with early_stopping=False: of the likeliest 2 * beams
  continuations, those that end are kept if they are among the first `beams`, and the others go on,
  until no one that goes on can get better than the worst of `beams` kept.  With a temperature the
  2 * beams are drawn without replacement from all continuations of all beams instead.

  It needs the engine for itself, and as many rows as beams; ValueError otherwise, and as in
  `Engine.check`.
  """
  if not 1 <= beams <= engine.rows:
    raise ValueError(f"beams is {beams}, expected 1 to the engine's {engine.rows} rows")
  step, cache, row = engine.read_alone(prompt, Sampling(max_new_tokens=max_new_tokens))
  programs, rng = engine.programs, np.random.default_rng(seed)
  logits = np.repeat(np.asarray(step.logits[row])[None], beams, axis=0)             # [k, V]
  scores = np.array([0.0] + [-np.inf] * (beams - 1))  # at first all beams are the same
  parents, answers = np.full(beams, row), [[] for _ in range(beams)]
  kept: list[tuple[float, list[int]]] = []
  for length in range(1, max_new_tokens + 1):
    totals = (_log_softmax(logits.astype(np.float64)) + scores[:, None]).reshape(-1)  # [k * V]
    chosen = _chosen(totals, 2 * beams, temperature, rng)
    going = []
    for rank, i in enumerate(chosen):
      beam, token = divmod(int(i), logits.shape[1])
      if token not in stop_ids:
        going.append((totals[i], beam, token))
      elif rank < beams:
        kept.append((totals[i] / length**length_penalty, [*answers[beam], token]))
    kept = sorted(kept, key=lambda one: -one[0])[:beams]
    going = going[:beams]
    answers = [[*answers[beam], token] for _, beam, token in going]
    scores = np.array([score for score, *_ in going])
    if length == max_new_tokens:
      kept += [(s / length**length_penalty, ids) for s, ids in zip(scores, answers)]
    elif len(kept) == beams and kept[-1][0] >= totals[chosen].max() / length**length_penalty:
      break
    else:
      of = parents[[beam for _, beam, _ in going]]
      step, cache = programs.branch(step, of, [token for *_, token in going], cache)
      starts = np.full(programs.rows, len(prompt) + length - 1)
      step, cache = programs.decode(step, starts, cache)
      parents, logits = np.arange(beams), np.asarray(step.logits[:beams])
  score, ids = max(kept, key=lambda one: one[0])
  return ids, float(score)


def _log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _chosen(totals, n, temperature, rng) -> np.ndarray:
  """Places of n continuations, the likeliest first."""
  scaled = totals
  if temperature:  # the largest of these are draws without replacement (Gumbel)
    scaled = totals / temperature + rng.gumbel(size=totals.shape)
  top = np.argpartition(-scaled, n)[:n]
  return top[np.argsort(-totals[top], kind="stable")]
