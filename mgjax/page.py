"""What the project's HTML pages share: each needs nothing else, and nothing shown can act."""
from __future__ import annotations

import html


def clean(text: object) -> str:
  """Without what would act on a terminal or turn the direction of writing."""
  return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
                 for c in str(text))


def escape(text: object) -> str:
  """Text as HTML."""
  return html.escape(clean(text))


def document(over: str, title: str, sections: list[str], style: str, tab: str = "") -> str:
  """A page: a small line, a heading, sections of HTML; `style` comes behind what all pages have.

  tab: what the browser's tab says, the title if empty.
  """
  return (f"<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport "
          f'content="width=device-width,initial-scale=1"><title>{escape(tab or title)}</title>'
          f"<style>{_STYLE}{style}</style></head><body><main><header><p class=over>{escape(over)}"
          f"</p><h1>{escape(title)}</h1></header>{''.join(sections)}</main></body></html>\n")


_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b2330;--faint:#667085;--line:#e3e7ed;
--accent:#3b6fd4;--soft:#e9effb;--good:#16794c;--goodbg:#e7f6ee;--bad:#b3261e;--badbg:#fdeceb;
--warn:#9a6700}
@media(prefers-color-scheme:dark){:root{--bg:#10141b;--card:#181e28;--ink:#e6eaf0;--faint:#93a0b4;
--line:#2a3342;--accent:#7aa5f7;--soft:#202b40;--good:#5fd39b;--goodbg:#12291f;--bad:#ff8f86;
--badbg:#321a1a;--warn:#e3b341}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
header .over{margin:0;color:var(--faint);text-transform:uppercase;letter-spacing:.08em;
font-size:12px}
h1{margin:2px 0 20px;font-size:20px;font-weight:600;overflow-wrap:anywhere}
h2{margin:0 0 12px;font-size:18px}h3{margin:22px 0 6px;font-size:15px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 22px;
margin:16px 0}
pre{margin:12px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,
SFMono-Regular,Menlo,Consolas,monospace}
section pre{background:var(--soft);padding:10px 12px;border-radius:8px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.faint,small{color:var(--faint)}
small{font-size:12px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 10px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th{font-size:12px;font-weight:600;color:var(--faint);white-space:nowrap}
tbody tr:last-child td{border-bottom:0}
.l{text-align:left}td.l b{font-weight:600;overflow-wrap:anywhere}
@media print{section{break-inside:avoid}}
"""
