"""Pictures: the arrays behind them, text to the letter, and PNGs that show something."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

import flexjax
from flexjax import BlockMask, create_block_mask, masks, scores, visualize

mpl.use("Agg")

PACKAGE = Path(flexjax.__file__).parent
FILES = sorted(path for room in ("masks", "scores") for path in (PACKAGE / room).glob("[a-z]*.py"))


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def colours(file):
    """How often each colour occurs in a PNG."""
    pixels = (plt.imread(file)[..., :3] * 255).round().astype(int) @ [1 << 16, 1 << 8, 1]
    found, counts = np.unique(pixels, return_counts=True)
    return {f"#{colour:06x}": int(n) for colour, n in zip(found, counts, strict=True)}


def save(ax, tmp_path):
    file = tmp_path / "picture.png"
    ax.figure.savefig(file, dpi=60)
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    return colours(file)


# Grids


def test_mask_grid_of_one_batch_entry_and_head():
    mod = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 10 * b + 100 * h
    q, kv = np.ogrid[:5, :300]
    np.testing.assert_array_equal(visualize.mask_grid(mod, 5, 300), kv <= q)
    np.testing.assert_array_equal(visualize.mask_grid(mod, 5, 300, b=2, h=1), kv <= q + 120)


def test_mask_grid_of_a_constant():
    result = visualize.mask_grid(masks.noop_mask, 3, 4)
    assert result.shape == (3, 4)
    assert result.all()


def test_score_grid():
    given = np.arange(12.0).reshape(3, 4)
    mod = lambda score, b, h, q_idx, kv_idx: score * 2 + b + 10 * h
    np.testing.assert_array_equal(visualize.score_grid(mod, 3, 4, 1, 2), np.full((3, 4), 21.0))
    masked = visualize.score_grid(mod, 3, 4, scores=given, mask_mod=masks.causal())
    np.testing.assert_array_equal(masked, np.where(np.tri(3, 4) > 0, given * 2, -np.inf))


# Text


def test_mask_text_is_this_picture():
    picture = visualize.mask_text(
        masks.and_masks(masks.causal(), masks.document_from_lengths([3, 2], 6)), 6, 6
    )
    assert picture.split("\n") == [
        "causal_and_document  6 x 6, 25.0% allowed",
        "██          ",
        "████        ",
        "██████      ",
        "      ██    ",
        "      ████  ",
        "            ",
    ]


def test_blocks_text_is_this_picture():
    states = np.array([[2, 1, 0], [2, 2, 1]])
    assert visualize.blocks_text(states) == "██░░  \n████░░"
    assert visualize.blocks_text(states, width=1) == "█░ \n██░"


def test_blocks_text_merges():
    """Four columns into two, three rows into two (one, then two): full and empty only if all is."""
    states = np.array([[2, 2, 0, 0], [2, 2, 0, 0], [2, 2, 0, 1]])
    assert visualize.blocks_text(states, 2, 2, width=1) == "█ \n█░"
    mixed = np.array([[2, 0], [2, 0]])
    assert visualize.blocks_text(mixed, 1, 1, width=1) == "░"


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (31, 33), (32, 32), (100, 65)], ids=str)
def test_blocks_text_fits(shape):
    lines = visualize.blocks_text(np.full(shape, 2)).split("\n")
    assert len(lines) == min(shape[0], 32)
    assert {len(line) for line in lines} == {2 * min(shape[1], 32)}


def test_score_text_is_this_picture():
    picture = visualize.score_text(lambda score, b, h, q_idx, kv_idx: (kv_idx + q_idx) * 1.0, 2, 5)
    assert picture.split("\n") == [
        "lambda  2 x 5, from 0 to 5",
        "  ░░▒▒▓▓██",
        "░░▒▒▓▓████",
    ]


def test_score_text_of_a_constant():
    picture = visualize.score_text(scores.head_scale(jnp.ones(1)), 2, 2)
    assert picture.split("\n") == ["head_scale  2 x 2, from 0 to 0", "    ", "    "]


def test_block_mask_prints_its_picture():
    mask = create_block_mask(masks.causal(), None, None, 64, 64, 16)
    assert visualize.blocks_text(np.asarray(mask.block_states())[0, 0]) in str(mask)
    assert "██████░░" in str(mask)


# Plots


def test_plot_mask_shows_the_share_allowed(tmp_path):
    ax = visualize.plot_mask(masks.causal(), 64, 64)
    assert ax.get_title(loc="left") == "causal"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("kv_idx\n50.8% allowed", "q_idx")
    assert ax.get_xlim() == (0, 64)
    assert ax.get_ylim() == (64, 0)
    found = save(ax, tmp_path)
    allowed, masked = found["#1f5f99"], found["#f2f2f2"]
    assert 0.4 < allowed / (allowed + masked) < 0.6


def test_plot_mask_keeps_thin_lines_of_a_large_mask():
    ax = visualize.plot_mask(masks.sliding_window(0), 4096, 4096, title="diagonal")
    image = ax.get_images()[0].get_array()
    assert image.shape == (512, 512)
    np.testing.assert_allclose(image, np.eye(512) / 8)
    assert ax.get_title(loc="left") == "diagonal"


def test_plot_mask_of_few_queries_fills_the_axes():
    assert visualize.plot_mask(masks.causal(99), 1, 100).get_aspect() == "auto"
    assert visualize.plot_mask(masks.causal(), 50, 100).get_aspect() == 1.0


def test_plot_into_given_axes():
    _, axes = plt.subplots(1, 2)
    assert visualize.plot_mask(masks.causal(), 4, 4, ax=axes[0]) is axes[0]
    assert visualize.plot_scores(scores.alibi(1), 4, 4, ax=axes[1]) is axes[1]
    assert len(plt.get_fignums()) == 1


def test_plot_blocks(tmp_path):
    mask = create_block_mask(masks.causal(), None, None, 200, 256, 64)
    ax = visualize.plot_blocks(mask, b=3, h=5)
    expected = [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), expected)
    assert ax.get_title(loc="left") == "200 x 256 in blocks of 64 x 64"
    assert ax.get_xlabel() == "kv_idx\n62.5% of blocks visited"
    assert ax.get_ylim() == (200, 0)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["full", "partial", "empty"]
    found = save(ax, tmp_path)
    assert min(found[colour] for colour in ("#1f5f99", "#9cc3e0", "#f2f2f2")) > 100


def test_plot_blocks_of_a_slice_and_of_one_batch_entry():
    mask = create_block_mask(masks.padding(jnp.array([64, 0])), 2, None, 256, 256, 64)
    rows = visualize.plot_blocks(mask[:, :, 2:4], b=0)
    assert rows.get_ylim() == (256, 128)
    assert rows.get_images()[0].get_array().tolist() == [[2, 0, 0, 0]] * 2
    assert not visualize.plot_blocks(mask, b=1).get_images()[0].get_array().any()


def test_plot_scores_leaves_masked_places_grey(tmp_path):
    ax = visualize.plot_scores(scores.alibi(8), 32, 32, mask_mod=masks.causal())
    image = ax.get_images()[0]
    np.testing.assert_array_equal(image.get_array().mask, np.tri(32) == 0)
    assert image.get_clim() == (-15.5, 15.5)
    assert save(ax, tmp_path)["#c8c8c8"] > 1000


def test_plot_scores_of_nothing_but_masked_places():
    ax = visualize.plot_scores(scores.alibi(8), 4, 4, mask_mod=masks.or_masks())
    assert ax.get_images()[0].get_clim() == (-1, 1)


# Every file draws itself


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_file_draws_itself(file, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "own.png"
    monkeypatch.setattr(sys, "argv", [str(file), "--save", str(picture)])
    runpy.run_path(str(file), run_name="__main__")
    printed = capsys.readouterr().out
    assert "64 x 64, " in printed
    assert "██" in printed or "░░" in printed
    assert len(colours(picture)) > 2


@pytest.mark.parametrize("module", ["flexjax.masks.causal", "flexjax.scores.alibi"])
def test_module_runs_without_a_warning(module):
    done = subprocess.run(
        [sys.executable, "-m", module],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=True,
    )
    assert done.stdout.startswith(f"{module.rsplit('.', 1)[1]}  64 x 64, ")
    assert "RuntimeWarning" not in done.stderr


# Bad input


def test_plots_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    mask = create_block_mask(masks.causal(), None, None, 64, 64, 16)
    for plot in (
        lambda: visualize.plot_mask(masks.causal(), 4, 4),
        lambda: visualize.plot_scores(scores.alibi(1), 4, 4),
        lambda: visualize.plot_blocks(mask),
    ):
        with pytest.raises(ImportError, match=r"matplotlib.*viz extra.*flexjax\[viz\].*mask_text"):
            plot()


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (
            lambda: visualize.mask_grid(lambda b, h, q, k: q - k, 2, 2),
            TypeError,
            "lambda must return a boolean, but it returned int32",
        ),
        (
            lambda: visualize.mask_text(masks.causal(), 0, 4),
            ValueError,
            "q_len must be at least 1, but it is 0",
        ),
        (
            lambda: visualize.mask_grid(masks.causal(), 4, 4.0),
            TypeError,
            "kv_len must be a Python integer",
        ),
        (
            lambda: visualize.score_grid(scores.alibi(1), 4, 4, scores=np.zeros((4, 5))),
            ValueError,
            r"must have shape \(q_len, kv_len\) = \(4, 4\).*\(4, 5\)",
        ),
        (
            lambda: visualize.blocks_text(np.zeros((2, 2, 2), int)),
            ValueError,
            r"must have shape.*\(2, 2, 2\)",
        ),
        (lambda: visualize.blocks_text(np.zeros((0, 2), int)), ValueError, "at least 1"),
        (lambda: visualize.blocks_text(np.array([[0, 3]])), ValueError, r"include \[3\]"),
        (
            lambda: visualize.blocks_text(np.zeros((2, 2), int), rows=0),
            ValueError,
            "rows must be at least 1",
        ),
    ],
    ids=[
        "integer-mask",
        "no-queries",
        "float-length",
        "scores-shape",
        "rank",
        "no-blocks",
        "unknown-state",
        "no-rows",
    ],
)
def test_bad_arguments(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


# Attention and HTML


def test_attention_grid_is_softmax_over_what_is_visible():
    """Grouped heads, a score_mod, a sliced block mask that leaves blocks out: rows without keys give 0."""
    query, key = jax.random.normal(jax.random.key(0), (2, 2, 4, 12, 8))
    key = key[:1, :2]
    states = jnp.ones((1, 1, 3, 3)).at[0, 0, 1].set(-jnp.inf)
    whole = BlockMask.from_block_scores(
        states, top_k=2, mask_mod=masks.causal(), block_size=4, seq_lengths=(12, 12)
    )
    slopes = scores.alibi(4)
    options = {"score_mod": slopes, "scale": 0.5}
    found = visualize.attention_grid(
        query[:, :, 4:], key, 1, 3, block_mask=whole[:, :, 1:], **options
    )
    logits = np.asarray(0.5 * query[1, 3, 4:] @ key[0, 1].T)
    q, kv = np.ogrid[4:12, :12]
    logits = logits + np.asarray(scores.alibi_slopes(4))[3] * (kv - q)
    seen = (kv <= q) & (q >= 8) & (kv < 8)
    expected = np.where(seen, np.exp(logits), 0)
    expected[4:] /= expected[4:].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    plain = visualize.attention_grid(query, key, 1, 3, mask_mod=masks.causal(), softmax=False)
    assert np.isneginf(plain[np.triu_indices(12, 1)]).all()
    assert np.isfinite(plain[np.tril_indices(12)]).all()


@pytest.mark.parametrize("softmax", [True, False])
def test_plot_attention(softmax, tmp_path):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 16, 8))
    ax = visualize.plot_attention(query, key, mask_mod=masks.causal(), softmax=softmax)
    found = save(ax, tmp_path)
    assert found["#c8c8c8"] > 1000  # what is masked
    assert len(found) > 50
    assert ax.get_title(loc="left") == "batch row 0, head 0"


def test_attention_grid_says_what_does_not_fit():
    query = jnp.ones((2, 4, 8, 8))
    mask = create_block_mask(masks.causal(), None, None, 16, 16, 8)
    for options, message in [
        ({"key": jnp.ones((2, 3, 8, 8))}, "Hkv a divisor of Hq"),
        ({"key": query, "h": 4}, "one of 4 query heads, but they are 0 and 4"),
        ({"key": query, "block_mask": mask}, r"block mask is for lengths \(16, 16\)"),
        ({"key": query, "block_mask": mask, "mask_mod": masks.causal()}, "both were given"),
    ]:
        with pytest.raises(ValueError, match=message):
            visualize.attention_grid(query, **options)


def test_a_notebook_shows_the_blocks():
    mask = create_block_mask(masks.document_from_lengths([40, 56], causal=True), 1, 6, 96, 96, 8)
    shown = mask._repr_html_()
    assert "BlockMask (1, 6, 96, 96), blocks of 8 x 8, " in shown
    assert "and 2 more" in shown
    pictures = re.findall(r"<svg.*?</svg>", shown)
    assert len(pictures) == 4
    drawn = np.zeros((12, 12), int)
    for picture in ET.fromstring(pictures[0]).findall(".//{*}rect[@x]"):
        x, y, width = (int(picture.get(name)) for name in ("x", "y", "width"))
        drawn[y, x : x + width] = {"#9cc3e0": 1, "#1f5f99": 2}[picture.get("fill")]
    np.testing.assert_array_equal(drawn, np.asarray(mask.block_states())[0, 0])
    assert jax.eval_shape(lambda: mask)._repr_html_() is None
    wide = create_block_mask(masks.noop_mask, None, None, 100, 20000, 20)._repr_html_()
    assert wide.count("<rect") == 6
    assert "full" in wide
