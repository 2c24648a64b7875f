import pytest

import provq
from provq.recipe import load


@pytest.fixture
def tars(root):
    folder = root.parent / "shared" / "data" / "images_train"
    if not folder.is_dir():
        pytest.skip("the 64-pixel pictures, which may not be shipped, are not beside the repository")
    return folder


def test_the_shipped_recipe_trains_on_real_pictures_and_is_measured_on_others(tars, tmp_path):
    # Few small steps: what is shown is that the pieces fit, not what they reach.
    recipe = load("image/tiny64", [f"data.train={tars}/train-00000[01].tar", f"data.val={tars}/val-*.tar"])
    short = recipe.with_changes(
        {
            "encoder": {"width": 16},
            "decoder": {"width": 16},
            "quantizer": {"codebook_size": 64},
            "training": {"steps": 30, "probe_every": 0},
        }
    )
    tokenizer = provq.train(short, out=tmp_path / "run")
    numbers = provq.evaluate(tokenizer)
    assert numbers["count"] == 2500
    # The mean colour of each picture would give about 12 dB.
    assert numbers["psnr"] > 11
    assert numbers["bits_per_item"] == 64 * 6
