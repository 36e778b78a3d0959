"""The stripe of an induction head, and the page of every head's attention, in a real browser."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import eval_copy
from data.tokenizer import Bytes, Chars
from errors import UserError
from measures import attention, heads
from tests.handbuilt import induction_model
from tests.test_eval_copy import save, small_model

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PROMPT = "the quick brown fox. the qui"


@pytest.fixture(scope="module")
def hand_built():
    """The hand-built model, its page for PROMPT, its attention (2, 4, T, T) there, and the page's path."""
    tokenizer = Bytes()
    model, _, _ = induction_model(tokenizer.size, 128, tokenizer.bos)
    ids = [tokenizer.bos, *PROMPT.encode()]
    scores = heads.attention_scores(model, np.arange(256), tokenizer.bos, samples=2)
    page = attention.page(model, ids, ["<bos>", *PROMPT], scores, "hand-built")
    return page, torch.cat(list(model.attention_maps(torch.tensor([ids])))).numpy()


def test_stripes_are_those_of_the_hand_built_heads():
    tokenizer = Bytes()
    model, previous, induction = induction_model(tokenizer.size, 128, tokenizer.bos)
    scores = heads.attention_scores(model, np.arange(256), tokenizer.bos, samples=2)
    found = attention.stripes(model, np.arange(256), tokenizer.bos, scores)
    s, lead = found["s"], found["lead"]
    assert (s, lead) == (25, 1) and [head[:2] for head in found["heads"].values()] == [previous, induction]
    one_back, stripe = (head[3] for head in found["heads"].values())
    assert one_back.shape == stripe.shape == (51, 51) and one_back.diagonal(-1).min() > 0.95
    # It wants three tokens that agree, so that its stripe begins at the third token of the second copy.
    assert stripe.diagonal(1 - s)[lead + 3 : s].min() > 0.95 and stripe[lead : lead + s, lead:].max() < 0.05


def test_the_previous_token_head_is_of_a_layer_before_the_induction_head():
    model = small_model(Chars(20))
    scores = {"induction": np.array([[0, 0, 0, 0], [0, 0.9, 0, 0]]), "previous": np.array([[0, 0, 0.2, 0], [0.8, 0, 0, 0]])}
    found = attention.stripes(model, np.arange(20), None, scores)["heads"]
    assert found["previous"][:3] == (0, 2, 0.2) and found["induction"][:3] == (1, 1, 0.9)
    found = attention.stripes(model, np.arange(20), None, scores | {"induction": scores["induction"][::-1]})["heads"]
    assert found["previous"][:2] == (1, 0) and found["induction"][:2] == (0, 1)  # none comes before the first layer


def test_the_page_holds_every_head_s_attention_and_nothing_from_elsewhere(hand_built):
    page, probs = hand_built
    data = json.loads(re.search(r"^const data = (.*);$", page, re.M)[1])
    T = len(PROMPT) + 1
    assert data["words"] == ["<bos>", *PROMPT] and (data["layers"], data["heads"]) == (2, 4)
    stored = np.frombuffer(base64.b64decode(data["maps"]), np.uint8).reshape(8, T * (T + 1) // 2)
    rows, columns = np.tril_indices(T)
    # p = (b / 255)^2 with b rounded by 1/2 at most: off by 2 * sqrt(p) / 255 / 2 < 0.004.
    np.testing.assert_allclose((stored / 255.0) ** 2, probs.reshape(8, T, T)[:, rows, columns], rtol=0, atol=0.004)
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|fetch\(", page) and len(page) < 40_000


def test_no_text_of_the_prompt_becomes_part_of_the_page():
    model = small_model(Chars(20))
    scores = heads.attention_scores(model, np.arange(20), None, samples=2)
    page = attention.page(model, [1, 2], ["</script><b>", '"'], scores, "<i>")
    assert page.count("</script>") == 1 and "<b>" not in page and "<i>" not in page


def test_a_prompt_too_long_for_a_page_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "MOST_CELLS", 8 * 55)
    model = small_model(Chars(20))
    scores = heads.attention_scores(model, np.arange(20), None, samples=2)
    assert attention.page(model, [1] * 10, ["b"] * 10, scores, "")
    with pytest.raises(UserError, match="prompt of 11 tokens: the page of a model with 8 heads shows 10 tokens at most"):
        attention.page(model, [1] * 11, ["b"] * 11, scores, "")


def in_browser(page, path, script):
    """The page's elements after `script` has run in a headless browser."""
    path.write_text(page.replace("\nstart();\n", f"\nstart();\n{script}\n"))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--dump-dom",
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300).stdout


def looks(dom):
    return re.sub("<[^>]+>", "", re.search(r'id="looks">(.*?)</div>', dom)[1])


HOVER = "document.querySelectorAll('#text span')[26].dispatchEvent(new Event('mouseenter'));"  # the q of the second "qui"


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_in_a_browser_a_token_under_the_pointer_shows_where_each_head_looks(hand_built, tmp_path):
    page, probs = hand_built
    dom = in_browser(page, tmp_path / "page.html", HOVER)
    assert looks(dom).startswith("From q (token 26) it looks at u (6) 1.00") and "Layer 1, head 0: induction 0.9" in dom
    shown = re.findall(r'class="to">(\d+)% (.*?)</span>', dom)  # of each head
    words = ["&lt;bos&gt;", *PROMPT]
    row = probs.reshape(8, 29, 29)[:, 26]
    assert len(shown) == 8 and dom.count("<canvas") == 9
    for (percent, word), p in zip(shown[:5], row, strict=False):  # the idle heads of layer 1 look at all tokens alike
        assert int(percent) == pytest.approx(100 * p.max(), abs=1) and word == words[p.argmax()].replace(" ", "\u00b7")
    tokens = re.findall(r"<span[^>]*>", re.search(r'id="text">(.*?)</div>', dom)[1])
    assert 'class="query"' in tokens[26] and "token 6: 1.000" in tokens[6] and 'class="later"' in tokens[27]
    shade = [re.search(r"rgba\(.*, ([\d.]+)\)", token) for token in tokens[:27]]
    assert [float(match[1]) for match in shade] == pytest.approx([0.8 * (k == 6) for k in range(27)], abs=0.01)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_a_click_keeps_a_token_and_chooses_a_head_and_a_wrong_page_is_found_out(hand_built, tmp_path):
    click = f"document.querySelectorAll('.head')[1].click(); {HOVER} document.querySelectorAll('#text span')[26].click();"
    dom = in_browser(hand_built[0], tmp_path / "page.html", click + HOVER.replace("26", "9"))
    assert looks(dom).startswith("From q (token 26) it looks at e (24) 1.00")  # two back
    chosen = re.findall(r'title="layer (\d), head (\d)" aria-pressed="true"', dom)
    assert "Layer 0, head 1: induction" in dom and chosen == [("0", "1")]
    wrong = hand_built[0].replace("q * (q + 1) / 2 + k]", "q * (q + 1) / 2]")  # the first token's probability for all
    assert "it looks at u (6)" not in looks(in_browser(wrong, tmp_path / "wrong.html", HOVER))


def test_the_command_writes_the_page_and_replaces_only_a_page(tmp_path, capsys):
    tokenizer = Chars(20)
    save(tmp_path / "ckpt.pt", small_model(tokenizer), tokenizer)
    file = tmp_path / "page.html"
    file.touch()  # an empty file, as mktemp makes, is no loss
    for _ in range(2):
        assert eval_copy.main([str(tmp_path), "--attention", "abcabc", str(file)]) == 0
        assert capsys.readouterr().out == f"page: {file}\n" and '["<bos>", "a", "b"'.replace("<", "\\u003c") in file.read_text()
    file.write_text("mine")
    with pytest.raises(UserError, match="exists and was not written by --attention"):
        eval_copy.main([str(tmp_path), "--attention", "abcabc", str(file)])
