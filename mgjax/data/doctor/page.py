"""How a data check is told: a page that needs nothing else, and a table for the terminal."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

from mgjax.data.doctor.examine import LINES, Lengths, Report, SourceReport
from mgjax.data.doctor.rows import Option, Rows
from mgjax.page import clean, document, escape

# What each kind of finding means, and the way out.
KINDS = {
    "format": ("Not a sample", "The record has not the shape {id, image, conversations}."),
    "roles": ("Wrong roles", "Turns must alternate human, gpt, and end with gpt."),
    "empty_answer": ("Empty answer", "There is nothing to learn in a turn of gpt."),
    "plain_turns": ("No caption", "The template takes one picture, one question, one answer."),
    "image_count": ("Pictures and <image> tags differ",
                    "Write one tag a picture, and give rows as many slots as a sample has."),
    "control_token": ("Control token in a text", "It would end a turn or begin one."),
    "path_escape": ("Path leads out of the folder", "Write it relative to image_root."),
    "missing_image": ("Picture is missing", "Fetch it, or is image_root another folder?"),
    "broken_image": ("Picture cannot be read", "Fetch the file again."),
    "oversized_image": ("Picture is too large", "Shrink the file."),
    "too_long": ("Too long", "Raise max_length, or let samples be cut with truncate."),
    "no_target": ("Nothing to learn", "The cut took the answer: raise max_length."),
    "truncated": ("Cut off", "The sample is longer than max_length: its end is not trained on."),
    "duplicate_id": ("Id is there twice", "Another sample of the same source has it."),
    "duplicate_elsewhere": ("Id is in another source too", "The same sample in two sources?"),
}
WIDTH, HEIGHT = 400, 140  # of a chart, without its scale
_ICON = {ok: f'<svg class=icon viewBox="0 0 24 24"><path d="{path}"/></svg>' for ok, path in (
    (True, "M4 13l5 5L20 6"), (False, "M5 5l14 14M19 5L5 19"))}


def page(report: Report) -> str:
  """The whole page.  Whatever comes from data or config is escaped."""
  v = report.verdict
  title = ", ".join(dict.fromkeys(s.path for s in report.sources))
  sections = [
      f'<section class="verdict {"good" if v.ok else "bad"}"><h2>{_ICON[v.ok]}'
      f"{escape(v.headline)}.</h2>"
      f"{_paragraphs(v.details)}</section>",
      _tiles(report), _notes(report.notes), _sources(report), _problems(report), _lengths(report),
      *(_rows(report, r) for r in report.packing), _settings(report)]
  return document("Data check", title, sections, _CSS, tab=v.headline)


def _short(text: str, most: int = 400) -> str:
  return text if len(text) <= most else f"{text[:most]} ..."


def _share(x: float) -> str:
  return f"{100 * x:.1f} %" if 0.0005 < abs(x) < 0.9995 else f"{100 * x:.0f} %"


def _section(title: str, *parts: str) -> str:
  return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _paragraphs(details: str) -> str:
  """Without the samples that a run would list, each indented: they are shown below."""
  lines = [line for line in details.splitlines() if not line.startswith("  ")]
  return "".join(f"<p>{escape(_short(line))}</p>" for line in lines)


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], left: int = 1) -> str:
  """Cells are HTML; rows are (class, cells); the first `left` columns hold words."""
  th = "".join(f"<th{' class=l' if i < left else ''}>{h}</th>" for i, h in enumerate(head))
  body = "".join(f'<tr class="{kind}">' + "".join(
      f"<td{' class=l' if i < left else ''}>{c}</td>" for i, c in enumerate(cells)) + "</tr>"
                 for kind, cells in rows)
  return f"<div class=scroll><table><thead><tr>{th}</tr></thead><tbody>{body}</tbody></table></div>"


def _tiles(report: Report) -> str:
  rows = report.packing[0] if report.packing else None
  facts = [(f"{report.samples:,}", "samples"), (f"{report.usable:,}", "usable"),
           (f"{report.images:,}", "pictures"), (f"{report.steps_per_epoch:,}", "steps an epoch"),
           (_share(rows.padding) if rows else "–", "padding")]
  return "<div class=tiles>" + "".join(
      f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>"
      for value, name in facts) + "</div>"


def _notes(notes: Sequence[str]) -> str:
  return f"<ul class=notes>{''.join(f'<li>{escape(n)}</li>' for n in notes)}</ul>" if notes else ""


def _sources(report: Report) -> str:
  def row(s: SourceReport):
    bad = sum(s.problems.values()) + sum(s.late.values())
    name = f"<b>{escape(s.name)}</b>" + (f"<br><small>{escape(s.path)}</small>"
                                       if s.path != s.name else "")
    kinds = [f"{k} {n:,}" for k, n in (s.problems | {f"{k} (later)": n for k, n in s.late.items()}
                                       ).items()]
    return "", [name, f"{s.samples:,}", f"{s.usable:,}", f"{s.images:,}",
                f'<span class="{"badtext" if bad else "faint"}">{bad:,}</span>'
                + (f"<br><small>{escape(', '.join(kinds))}</small>" if kinds else ""),
                _count(s.truncated), _count(s.duplicates + s.elsewhere), f"{s.drawn:,}",
                f"{s.text.p50:,} / {s.text.p99:,}", _spark(s.text)]
  head = ("source", "samples", "usable", "pictures", "problems", "cut off", "same id", "an epoch",
          "tokens of text<br><small>median / 99 %</small>", "")
  return _section("Sources", _table(head, map(row, report.sources)))


def _count(n: int) -> str:
  return f"<span class=faint>{n}</span>" if not n else f"{n:,}"


def _problems(report: Report) -> str:
  if not report.kinds:
    return _section("Problems", "<p>None.</p>")
  cards = []
  for kind, count in report.kinds.items():
    title, advice = KINDS.get(kind, (kind, ""))
    levels = {f.level for f in report.examples[kind]}
    tone = "warn" if levels == {"warning"} else "bad"
    examples = "".join(
        f"<li><code>{escape(_short(f.file, 200))} #{f.index}</code> <span class=faint>id "
        f"{escape(_short(f.id, 100))}</span><br>{escape(_short(f.message))}</li>"
        for f in report.examples[kind])
    more = count - len(report.examples[kind])
    cards.append(
        f'<div class="card {tone}"><h3>{count:,} × {escape(title)} <code>{escape(kind)}</code></h3>'
        f"<p>{escape(advice)}</p><ul>{examples}</ul>"
        + (f"<p class=faint>and {more:,} more</p>" if more > 0 else "") + "</div>")
  where = f"<p class=faint>All of them, one a line: <code>{LINES}</code></p>"
  return _section("Problems", where, "<div class=cards>", *cards, "</div>")


def _lengths(report: Report) -> str:
  most = report.settings["max_length"]
  charts = [("Text", "tokens, without visual ones", report.text, None),
            ("Pictures", "visual tokens", report.visual, None),
            ("Together", "positions in a row, before any cut", report.positions, most)]
  return _section(
      "Lengths of samples", f"<p class=faint>{report.text.count:,} samples could be measured.</p>",
      "<div class=charts>", *(
          f"<figure><figcaption><b>{name}</b> <span class=faint>{what}</span></figcaption>"
          f"{histogram(spread, mark)}<p class=faint>median {spread.p50:,} · 90 % {spread.p90:,} · "
          f"99 % {spread.p99:,} · longest {spread.longest:,} · in all {spread.total:,}</p></figure>"
          for name, what, spread, mark in charts), "</div>")


def histogram(spread: Lengths, mark: object = None) -> str:
  """Bars as SVG; mark: a length to draw a line at."""
  starts, counts = spread.starts, spread.counts
  top, n = max(counts), len(counts)
  if not top:
    return "<p class=faint>no samples</p>"
  step = WIDTH / n
  width = min(step - 1, 60)
  even = n > 1 and len({b - a for a, b in zip(starts, starts[1:])}) == 1
  parts = []
  for i, count in enumerate(counts):
    height = max(HEIGHT * count / top, 1.5 if count else 0)
    until = f"{starts[i]:,} to {starts[i + 1] - 1:,}" if i + 1 < n else f"{starts[i]:,} or more"
    parts.append(f'<g><title>{until}: {count:,}</title><rect class=hit x="{i * step:.1f}" y="0" '
                 f'width="{step:.1f}" height="{HEIGHT}"/><rect class=bar rx="1.5" '
                 f'x="{i * step + (step - width) / 2:.1f}" y="{HEIGHT - height:.1f}" '
                 f'width="{width:.1f}" height="{height:.1f}"/></g>')
    if n <= 6:
      parts.append(f'<text class=value x="{(i + 0.5) * step:.1f}" y="{HEIGHT - height - 5:.1f}" '
                   f'text-anchor="middle">{_share(count / spread.count)}</text>')
  every = max(1, round(n / 6))
  for i in range(0, n, every):
    x = i * step if even and n > 12 else (i + 0.5) * step
    anchor = "start" if not x else "middle"
    parts.append(f'<text x="{x:.1f}" y="{HEIGHT + 16}" text-anchor="{anchor}">{starts[i]:,}</text>')
  if even and isinstance(mark, int) and starts[0] <= mark <= starts[-1]:
    x = (mark - starts[0]) / (starts[1] - starts[0]) * step
    side, gap = ("end", -5) if x > WIDTH / 2 else ("start", 5)
    parts.append(f'<line class=mark x1="{x:.1f}" x2="{x:.1f}" y1="-14" y2="{HEIGHT}"/><text '
                 f'class=marktext x="{x + gap:.1f}" y="-5" text-anchor="{side}">max_length '
                 f"{mark:,}</text>")
  return (f'<svg viewBox="0 -18 {WIDTH} {HEIGHT + 38}" role=img><line class=axis x1="0" '
          f'x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>{"".join(parts)}</svg>')


def _spark(spread: Lengths) -> str:
  top, n = max(spread.counts), len(spread.counts)
  if not top:
    return ""
  bars = "".join(f'<rect class=bar x="{100 * i / n:.1f}" y="{24 - 24 * c / top:.1f}" '
                 f'width="{max(100 / n - 0.5, 0.5):.1f}" height="{24 * c / top:.1f}"/>'
                 for i, c in enumerate(spread.counts))
  return f'<svg class=spark viewBox="0 0 100 24" preserveAspectRatio=none>{bars}</svg>'


def _rows(report: Report, rows: Rows) -> str:
  many = f" at {rows.hr_size} pixels" if len(report.packing) > 1 else ""
  said = (f"<p>{rows.samples:,} samples make {rows.rows:,} rows in {rows.batches:,} batches an "
          f"epoch; <b>{_share(rows.padding)}</b> of all positions are padding"
          + (f", {_share(rows.empty_slots)} of the places for pictures are empty"
             if rows.empty_slots else "") + ".</p>")
  meter = (f'<div class=meter role=img aria-label="filled {_share(1 - rows.padding)}">'
           f'<i style="width:{100 * (1 - rows.padding):.1f}%"></i></div>')
  shapes = ""
  if len(rows.formats) > 1:
    shapes = _table(("batches", "rows", "length", "pictures a row", "padding", "empty places"), [
        ("", [f"{f['batches']:,}", f"{f['rows']:,}", f"{f['length']:,}", f"{f['slots']:,}",
              _share(f["padding"]), _share(f["empty_slots"])]) for f in rows.formats], left=0)
  def row(o: Option):
    marks = (" <mark class=best>best</mark>" if o.best else "") + (
        " <mark>yours</mark>" if o.configured else "")
    return ("best" if o.best else "yours" if o.configured else ""), [
        f"{o.batching}{marks}", f"{o.row_length:,}" + (
            f"<br><small>{escape(', '.join(map(str, o.buckets)))}</small>" if o.buckets else ""),
        str(o.images_per_row), f"{o.batch_size:,}", f"{o.samples_per_row:.2f}",
        f"{_share(o.padding)}{_bar(o.padding)}", _share(o.empty_slots), f"{o.work:.2f}"]
  head = ("batching", "row_length", "images_per_row", "batch_size", "samples a row", "padding",
          "empty places", "work")
  best = next(o for o in rows.options if o.best)
  advice = ("<p>Yours is as good as any of these.</p>" if best.configured else
            f"<p>An epoch with the best of these is {_share(1 - best.work)} less work than with "
            f"yours{f':</p><pre>{escape(flags_of(best))}</pre>' if not many else '.</p>'}")
  foot = (f"<p class=faint>Tried on {rows.tried:,} of the samples.  work: of the decoder on all "
          "positions, longer rows cost more attention; and for each place of a picture, filled or "
          "not, an eighth of what its positions cost; yours is 1.  best: of those within 1 % of "
          "the least, yours or else the shortest.  batch_size: rows that hold about as many "
          "samples a step as yours do; with accumulation or a mesh, take a multiple.</p>")
  return _section(f"Rows{many}", said, meter, shapes, "<h3>What other settings would give</h3>",
                  advice, _table(head, map(row, rows.options)), foot)


def flags_of(option: Option) -> str:
  """What sets it on a command line."""
  flags = [f"batching={option.batching}", f"images_per_row={option.images_per_row}",
           f"batch_size={option.batch_size}"]
  if option.batching == "packed":
    flags.insert(1, f"row_length={option.row_length}")
  if option.buckets:
    flags.append(f"buckets='{option.buckets}'")
  return " ".join(f"--config.data.{flag}" for flag in flags)


def _bar(share: float) -> str:
  return f'<div class=waste><i style="width:{100 * share:.1f}%"></i></div>'


def _settings(report: Report) -> str:
  told = "".join(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(value)}</dd>"
                 for name, value in report.settings.items())
  return _section("Settings", f"<dl>{told}</dl>")


def text(report: Report) -> str:
  """The same in short, for a terminal."""
  lines = []
  table = [("source", "samples", "usable", "pictures", "problems", "cut off", "same id",
            "text p50", "p99")]
  for s in report.sources:
    table.append((_short(clean(s.name), 40).replace("\n", " "), f"{s.samples:,}", f"{s.usable:,}",
                  f"{s.images:,}", f"{sum(s.problems.values()) + sum(s.late.values()):,}",
                  f"{s.truncated:,}", f"{s.duplicates + s.elsewhere:,}", f"{s.text.p50:,}",
                  f"{s.text.p99:,}"))
  widths = [max(map(len, column)) for column in zip(*table)]
  lines += ["  ".join(c.ljust(w) if not i else c.rjust(w)
                      for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in table]
  if report.kinds:
    lines += ["", *(f"{count:>9,}  {kind:20}  {KINDS.get(kind, (kind,))[0]}"
                    for kind, count in report.kinds.items())]
  for rows in report.packing:
    at = f" at {rows.hr_size} pixels" if len(report.packing) > 1 else ""
    lines += ["", f"{rows.samples:,} samples{at}: {rows.rows:,} rows, {rows.batches:,} batches an "
              f"epoch; padding {_share(rows.padding)}, empty places of pictures "
              f"{_share(rows.empty_slots)}"]
    lines.append(f"  {'batching':8} {'row_length':>10} {'images_per_row':>14} {'batch_size':>10} "
                 f"{'padding':>8} {'empty':>7} {'work':>5}")
    lines += [f"  {o.batching:8} {o.row_length:10,} {o.images_per_row:14} {o.batch_size:10,} "
              f"{_share(o.padding):>8} {_share(o.empty_slots):>7} {o.work:5.2f}"
              f"{'  best' if o.best else ''}{'  yours' if o.configured else ''}"
              for o in rows.options]
  lines += ["", *(clean(f"note: {note}") for note in report.notes)] if report.notes else []
  v = report.verdict
  lines += ["", f"{'OK' if v.ok else 'NOT OK'}: {clean(v.headline)}."]
  lines += [clean(v.details)] if v.details else []
  return "\n".join(lines)


_CSS = """
.verdict{border-left:6px solid}.verdict h2{margin:0;font-size:21px}.verdict p{margin:8px 0 0}
.verdict.good{border-left-color:var(--good);background:var(--goodbg)}
.verdict.good h2{color:var(--good)}
.verdict.bad{border-left-color:var(--bad);background:var(--badbg)}.verdict.bad h2{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin:16px 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px}
.tiles b{display:block;font-size:24px;font-weight:650;font-variant-numeric:tabular-nums}
.tiles span{color:var(--faint)}
.notes{margin:16px 0;padding-left:22px;color:var(--faint)}
td.l:first-child{min-width:170px}td small{display:inline-block;max-width:260px}
.badtext{color:var(--bad);font-weight:600}
tr.best td{background:var(--goodbg)}tr.yours td{background:var(--soft)}
mark{background:var(--line);color:var(--ink);border-radius:99px;padding:1px 8px;font-size:12px}
mark.best{background:var(--good);color:var(--card)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:12px}
.card{border:1px solid var(--line);border-left:4px solid var(--bad);border-radius:8px;
padding:10px 14px}
.card.warn{border-left-color:var(--warn)}
.card h3{margin:0}.card h3 code{color:var(--faint);font-weight:400}
.card p{margin:6px 0}.card ul{margin:6px 0;padding-left:18px}.card li{margin:4px 0;
overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:28px}
figure{margin:0}figure p{margin:4px 0;font-size:13px}
svg{display:block;width:100%;height:auto;margin-top:8px}
svg text{font-size:12px;fill:var(--faint)}svg .value{fill:var(--ink)}svg .marktext{fill:var(--bad)}
.bar{fill:var(--accent)}.hit{fill:transparent}g:hover .hit{fill:var(--soft)}
.axis{stroke:var(--line)}.mark{stroke:var(--bad);stroke-dasharray:4 3}
.spark{width:110px;height:26px;margin:0}
.icon{display:inline-block;width:22px;height:22px;margin:0 10px -3px 0;fill:none;
stroke:currentColor;stroke-width:3;stroke-linecap:round;stroke-linejoin:round}
.meter,.waste{background:var(--line);border-radius:99px;overflow:hidden}
.meter{height:10px;margin:8px 0}.meter i{display:block;height:100%;background:var(--accent)}
.waste{height:4px;margin-top:4px;min-width:70px}.waste i{display:block;height:100%;
background:var(--warn)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0}
dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere}
"""
