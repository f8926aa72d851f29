"""A page of the answers that were wrong, with their pictures: what to look at first."""
from __future__ import annotations

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence

from mgjax.data.images import ImageError, open_image
from mgjax.evaluate.benchmark import Answered, Benchmark, Question, Score
from mgjax.evaluate.report import figure
from mgjax.page import document, escape

MOST = 200   # answers that the page shows
SIDE = 320   # of their pictures, which are in the page
_LONGEST = 600  # characters of a question or an answer


def page(benchmark: Benchmark, answered: Sequence[Answered], score: Score, model: str,
         settings: Mapping[str, object], most: int = MOST) -> str:
  """HTML that needs nothing else.  Of more wrong answers than `most`, evenly chosen ones."""
  wrong = [a for a in answered if score.marks.get(a.question.key, 1.0) < 1.0]
  shown = [wrong[i * len(wrong) // most] for i in range(most)] if len(wrong) > most else wrong
  marked = sum(a.question.key in score.marks for a in answered)
  told = (f"{len(wrong):,} of {marked:,} answers are not, or not wholly, right"
          f"{f'; {len(shown):,} of them' if len(shown) < len(wrong) else ''}.")
  tiles = "".join(f"<div><b>{escape(figure(v))}</b><span>{escape(k)}</span></div>"
                  for k, v in score.headline.items())
  notes = "".join(f"<li>{escape(note)}</li>" for note in score.notes)
  dl = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in settings.items())
  sections = [f"<div class=tiles>{tiles}</div>",
              f"<ul class=notes>{notes}</ul>" if notes else "",
              f"<section><h2>Wrong answers</h2><p>{escape(told)}</p><div class=cards>"
              f"{''.join(_card(a, score) for a in shown)}</div></section>",
              *(_group(name, rows) for name, rows in score.groups.items()),
              f"<section><h2>Settings</h2><dl>{dl}</dl></section>"]
  return document(f"{benchmark.title}: wrong answers", model, sections, _CSS,
                  tab=f"{benchmark.title}: {model}")


def _card(answered: Answered, score: Score) -> str:
  q = answered.question
  mark, verdict = score.marks[q.key], ""
  if answered.verdict:
    verdict = f"<dt>judge</dt><dd>{_text(answered.verdict)}</dd>"
  return (f"<div class=card>{_picture(q)}<div><h3><code>{escape(q.key)}</code></h3>"
          f"<p class=asked>{_text(q.text)}</p><dl>"
          f"<dt>answer</dt><dd class=said>{_text(answered.text)}</dd>"
          f"<dt>expected</dt><dd>{_text(score.truths.get(q.key, ''))}</dd>{verdict}"
          f"{f'<dt>worth</dt><dd>{mark:.2f}</dd>' if mark else ''}</dl></div></div>")


def _text(text: str) -> str:
  return escape(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")


def _picture(question: Question) -> str:
  if question.image is None:
    return ""
  try:
    with open_image(question.image) as image:
      image.draft("RGB", (SIDE, SIDE))
      small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
  except (ImageError, OSError, ValueError) as error:
    return f"<p class=faint>{escape(error)}</p>"
  file = io.BytesIO()
  small.save(file, "JPEG", quality=80)
  name = question.image.name if isinstance(question.image, pathlib.Path) else "picture"
  return (f'<img alt="{escape(name)}" loading=lazy src="data:image/jpeg;base64,'
          f'{base64.b64encode(file.getvalue()).decode()}">')


def _group(name: str, rows: Mapping[str, float]) -> str:
  body = "".join(f"<tr><td class=l>{escape(k)}</td><td>{escape(figure(v))}</td></tr>"
                 for k, v in rows.items())
  return (f"<section><details><summary>{escape(name)}</summary><table><tbody>{body}</tbody></table>"
          "</details></section>")


_CSS = """
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin:16px 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px}
.tiles b{display:block;font-size:24px;font-weight:650;font-variant-numeric:tabular-nums}
.tiles span,.notes{color:var(--faint)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:12px}
.card{display:flex;gap:14px;border:1px solid var(--line);border-left:4px solid var(--bad);
border-radius:8px;padding:12px;min-width:0}
.card img{width:150px;max-width:40%;height:auto;align-self:flex-start;border-radius:6px}
.card>div{min-width:0;flex:1}.card h3{margin:0;font-weight:400}.card h3 code{color:var(--faint)}
.asked{margin:4px 0 8px;white-space:pre-wrap;overflow-wrap:anywhere}
.said{color:var(--bad);font-weight:600;white-space:pre-wrap}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:0}
dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer;font-weight:600}
"""
