"""An HTML page that needs no network: markup helpers, colours, style, script and skeleton."""

from __future__ import annotations

import base64
import hashlib
import html

__all__ = ["LINES", "STEPS", "box", "page", "safe"]

# One hue of rising or falling lightness, so that it reads without colour vision; see `_scale` for the text on it.
LIGHT = ["#f1f5f9", "#d8e6f1", "#bed6e9", "#a5c7e2", "#8cb8da", "#73a3cb", "#5a8ab5", "#41719f", "#285889", "#0f3f73"]
DARK = ["#1c2530", "#203347", "#23415d", "#274f74", "#2a5d8b", "#3b71a1", "#5a8cb7", "#78a7cc", "#97c1e2", "#b5dcf8"]
STEPS = len(LIGHT)
LINES = 5  # colours of lines


def page(title: str, lead: str, facts: str, tools: str, body: str, script: str = "") -> str:
    """The whole document; its policy lets nothing in but its own style and script.

    Args:
        title, lead: its heading and the paragraph below.
        facts: markup of a list of terms.
        tools: markup beside the button for light and dark.
        body: markup.
        script: more of it, which may talk to the page's own server.
    """
    whole = _SCRIPT + script
    digest = base64.b64encode(hashlib.sha256(whole.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return _PAGE.format(
        policy=policy + ("; connect-src 'self'" if script else ""),
        title=safe(title),
        lead=safe(lead),
        style=_STYLE + _scale(),
        tools=tools,
        facts=facts,
        body=body,
        script=whole,
    )


def safe(raw: str) -> str:
    """Safe in HTML, attributes too; lone surrogates, which no file can hold, become question marks."""
    return html.escape(raw.encode("utf-8", "replace").decode())


def box(name: str, inside: str) -> str:
    """A part that scrolls sideways by itself; `name` is for who can not see it."""
    return f'<div class="box" tabindex="0" role="region" aria-label="{safe(name)}">{inside}</div>'


def _scale() -> str:
    rules = []
    for step, (light, dark) in enumerate(zip(LIGHT, DARK, strict=True)):
        ink = ("#000" if step < 7 else "#fff", "#fff" if step < 6 else "#000")
        rules.append(f".h{step}{{background:light-dark({light},{dark});color:light-dark({ink[0]},{ink[1]})}}")
    return "\n".join(rules)


_STYLE = """
:root{color-scheme:light dark;--ground:light-dark(#fff,#12161b);--ink:light-dark(#1a1f26,#e4e8ed);
--soft:light-dark(#56606b,#a3adb8);--rule:light-dark(#d5dbe1,#333c46);--shade:light-dark(#fbe3b8,#4a3a17);
--c0:light-dark(#1d5c9c,#7cb9ec);--c1:light-dark(#b34700,#f2a15f);--c2:light-dark(#00755e,#4fc7a8);
--c3:light-dark(#8d3b79,#dd9acb);--c4:light-dark(#56606b,#c2c9d1)}
:root[data-theme=light]{color-scheme:light}:root[data-theme=dark]{color-scheme:dark}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main,header{max-width:1320px;margin:0 auto;padding:0 20px}header{padding-top:28px}main{padding-bottom:60px}
h1{font-size:24px;line-height:1.25;margin:0 0 8px}
h2{font-size:19px;margin:44px 0 4px}h3{font-size:15px;margin:22px 0 8px}
p{max-width:76ch;margin:6px 0;color:var(--soft)}small{display:block;font-size:11px;font-weight:400}
dl{display:grid;grid-template-columns:auto 1fr;gap:2px 16px;margin:14px 0}dt{color:var(--soft)}dd{margin:0}
.tools{display:flex;flex-wrap:wrap;gap:12px;align-items:center}
button,select{font:inherit;color:inherit;background:var(--ground);border:1px solid var(--soft);border-radius:4px;
padding:3px 10px;max-width:100%}:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
.box{overflow-x:auto;max-width:100%;padding-bottom:4px}
table{border-collapse:separate;border-spacing:2px;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th{font-weight:400;text-align:left;vertical-align:bottom;padding:3px 8px 3px 0}thead small,th small{color:var(--soft)}
td{text-align:center;padding:4px 7px;white-space:nowrap}td.none{color:var(--soft)}
tbody th{position:sticky;left:0;background:var(--ground);overflow-wrap:anywhere}
.scores th{min-width:64px}.scores thead th:not(:first-child){text-align:center;vertical-align:top;padding-right:0}
.scores tr:not(:has(th small))+tr:has(th small)>*{border-top:10px solid var(--ground)}
.scores tbody th{min-width:118px;max-width:210px;vertical-align:middle}
.beta th bdi{writing-mode:vertical-rl;display:inline-block;white-space:nowrap;max-height:150px;overflow:hidden}
.beta td{padding:4px 0;min-width:25px;font-size:12px}.beta bdi{color:var(--soft)}
.beta .own{font-weight:700;color:inherit}
.beta thead th{padding:0;text-align:center}.beta tbody th{white-space:nowrap}
.beta thead th:first-child,.beta tbody tr:last-child th{text-align:left;font-weight:700}
.cosines tbody th{min-width:130px;max-width:min(46vw,440px);font-size:13px;line-height:1.35}
.cosines thead th:not(:first-child){text-align:center}
.legend{display:block;font-size:12px;color:var(--soft);margin:6px 0}
.legend i{display:inline-block;width:18px;height:11px}
.keys i{display:inline-block;width:14px;height:3px;vertical-align:middle}
section:has(svg){display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));column-gap:32px}
section>:not(article){grid-column:1/-1}article{min-width:0}
svg{display:block;width:100%;min-width:560px;max-width:800px}svg text{font-size:12px;fill:var(--soft)}
svg .label{fill:var(--ink);paint-order:stroke;stroke:var(--ground);stroke-width:3px}
.grid,.leader{stroke:var(--rule)}
.reference{stroke:var(--soft);stroke-dasharray:5 4}.chosen{fill:var(--shade);shape-rendering:crispEdges}
polyline{fill:none;stroke-width:1.8}.bar{stroke-width:1.6;opacity:.55}
[hidden]{display:none}@media print{.tools{display:none}}
""" + "".join(
    f".l{i}{{stroke:var(--c{i})}}.d{i}{{fill:var(--c{i})}}.k{i}{{background:var(--c{i})}}\n" for i in range(LINES)
)

_SCRIPT = """
const root = document.documentElement;
const [theme, model] = ["theme", "model"].map((id) => document.getElementById(id));
theme.hidden = false;
theme.onclick = () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
if (model) model.onchange = () => {
  for (const panel of document.querySelectorAll("article"))
    panel.hidden = Boolean(model.value && panel.dataset.model && panel.dataset.model !== model.value);
};
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{lead}</p>
<dl>{facts}</dl>
<div class="tools"><button id="theme" type="button" hidden>Light or dark</button>{tools}</div>
</header>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
