"""The server's page: texts pasted in, their similarities and how their tokens read the slot shown below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .embedder import Embedder
from .explanation import Explanation
from .heatmaps import BETA, beta_map, cosine_map
from .page import page, safe
from .prompts import UNLIMITED

__all__ = ["MAX_TEXTS", "compare_page", "compared"]

MAX_TEXTS = 32  # a table of n x n cells


def compare_page(embedder: Embedder, name: str, *, with_key: bool) -> str:
    """The page itself; `with_key`: with a field for an API key."""
    config, most = embedder.config, embedder.max_tokens
    layers = ", ".join(map(str, config.layers or ())) or "none"
    facts = {
        "model": name,
        "method": f"{config.method}, config {config.hash()}",
        "layers changed": layers,
        "dimensions": str(embedder.dim),
        "longest input": "no limit" if most >= UNLIMITED else f"{most:,} tokens, template included",
    }
    listed = "\n".join(f"<dt>{safe(term)}</dt><dd>{safe(value)}</dd>" for term, value in facts.items())
    key = '<label>API key <input id="key" type="password" autocomplete="off"></label>' if with_key else ""
    body = _FORM.format(key=key, most=MAX_TEXTS)
    lead = "A frozen language model as a text-embedding model."
    return page("kvembed: texts compared", lead, listed, "", body, _SCRIPT)


def compared(texts: Sequence[str], cosines: NDArray[np.float32], explanation: Explanation) -> str:
    """Markup of the similarities of `texts`, and of the first one's attention."""
    return (
        f"<section><h2>Similarity</h2>\n<p>Cosine of each text with each.</p>\n{cosine_map(texts, cosines)}</section>\n"
        f"<section><h2>Attention to the slot, first text</h2>\n<p>{safe(BETA)}</p>\n{beta_map(explanation)}</section>"
    )


_FORM = """<form id="form">
<p><label for="texts">Texts, one a line, {most} at most. They are read by this server alone and not kept.</label></p>
<p><textarea id="texts" rows="8" cols="90" spellcheck="false" required>The ferry leaves from pier three.
Boats to the island start at the third pier.
Moths lay their eggs in wool.</textarea></p>
<div class="tools"><label>Role <select id="role"><option>document<option>query</select></label>
{key}<button>Compare</button></div>
</form>
<p id="status" role="status"></p>
<div id="shown"></div>"""

_SCRIPT = """
const [form, texts, role, key, state, shown] =
  ["form", "texts", "role", "key", "status", "shown"].map((id) => document.getElementById(id));
form.onsubmit = async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true;
  state.textContent = "Embedding";
  try {
    const headers = {"Content-Type": "application/json"};
    if (key && key.value) headers.Authorization = `Bearer ${key.value}`;
    const lines = texts.value.split("\\n").filter((line) => line.trim());
    const answer = await fetch("compare", {
      method: "POST", headers, body: JSON.stringify({texts: lines, role: role.value}),
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    shown.innerHTML = await answer.text();
    state.textContent = "";
  } catch (error) {
    shown.textContent = "";
    state.textContent = error.message;
  }
  button.disabled = false;
};
"""
