"""The cache on disk: keyed by content, whole or made again, shared by processes."""

import errno

import pytest
import torch
from safetensors.torch import load_file

from fit3d_ns.features import (
    FeatureCache,
    FeatureKey,
    compute_feature_key,
    create_extractor,
    describe_backbone,
    extract_features,
)
from tests.children import run_processes

BACKBONE = "random:tiny_dinov2_reg"


def _images(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8) for size in sizes]


@pytest.fixture(autouse=True)
def batch_shapes(monkeypatch):
    """For each backbone that `extract_features` builds, the shapes of the batches that it sees."""
    built = []

    def create(description, **kwargs):
        extractor, shapes = create_extractor(description, **kwargs), []
        built.append(shapes)
        return lambda images: shapes.append(tuple(images.shape)) or extractor(images)

    monkeypatch.setattr("fit3d_ns.features.cache.create_extractor", create)
    return built


def _setup(tmp_path):
    return FeatureCache(tmp_path, describe_backbone(BACKBONE))


def _extract(images, cache, **kwargs):
    return extract_features([lambda image=image: image for image in images], cache, **kwargs)


def test_extract_features__stores_what_the_extractor_gives(tmp_path, batch_shapes):
    cache, tolerance = _setup(tmp_path), 2**-10
    sizes = [(30, 45), (30, 45), (44, 28), (30, 45)]
    images = _images(sizes)
    keys = _extract(images, cache, batch_size=2)
    assert len(batch_shapes) == 1 and sorted(shape[0] for shape in batch_shapes[0]) == [1, 1, 2]
    extractor = create_extractor(BACKBONE)
    for image, key, (height, width) in zip(images, keys, sizes, strict=True):
        tokens, prefix_tokens = cache.load(key), load_file(cache.get_path(key))["prefix_tokens"]
        expected = extractor((image.float() / 255).permute(2, 0, 1)[None])
        assert tokens.shape == (height // 14, width // 14, 16) and prefix_tokens.shape == (5, 16)
        assert tokens.dtype == torch.float16
        # Half precision keeps 11 bits; tokens are of order one after the norm.
        torch.testing.assert_close(tokens.float(), expected.maps[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(prefix_tokens.float(), expected.prefix_tokens[0], rtol=tolerance, atol=tolerance)


def test_extract_features__builds_no_backbone_when_nothing_is_missing(tmp_path, batch_shapes):
    cache = _setup(tmp_path)
    images = _images([(30, 45)] * 3)
    keys = _extract(images, cache)
    assert _extract(images, cache) == keys and len(batch_shapes) == 1
    _extract([*images, *_images([(30, 45)], seed=9)], cache)
    assert batch_shapes[1] == [(1, 3, 30, 45)]


def test_extract_features__extracts_equal_images_once(tmp_path, batch_shapes):
    image = _images([(28, 28)])[0]
    keys = _extract([image] * 5, _setup(tmp_path), batch_size=2)
    assert len(set(keys)) == 1 and len(keys) == 5
    assert batch_shapes == [[(1, 3, 28, 28)]]


def test_extract_features__holds_few_images_of_many_sizes(tmp_path, monkeypatch):
    cache = _setup(tmp_path)
    images = _images([(28 + index, 30) for index in range(20)])
    seen, runs = [], []
    extractor = create_extractor(cache.description)

    def run(batch):
        runs.append(len(seen))
        return extractor(batch)

    monkeypatch.setattr("fit3d_ns.features.cache.create_extractor", lambda *args, **kwargs: run)
    extract_features([lambda image=image: (seen.append(1), image)[1] for image in images], cache, batch_size=1)
    # Batches of one: each image runs as soon as it is read; at most a handful is read ahead.
    assert len(runs) == 20 and all(read - done <= 4 for done, read in enumerate(runs))


def test_extract_features__leaves_global_random_state_alone(tmp_path):
    cache = _setup(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _extract(_images([(28, 28)]), cache)
    assert torch.equal(torch.get_rng_state(), before)


def test_extract_features__passes_on_what_reading_an_image_raises(tmp_path):
    cache = _setup(tmp_path)
    image = _images([(28, 28)])[0]

    def fail():
        raise ValueError("No such image: frame_7.jpg.")

    with pytest.raises(ValueError, match="frame_7.jpg"):
        extract_features([lambda: image, fail], cache, batch_size=1)
    # What was extracted before stays.
    assert cache.contains(compute_feature_key(image))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))


def _copy_other_size(path):
    """A file of an image of another size under this image's name."""
    other = _setup(path.parent / "other")
    key = _extract(_images([(56, 56)]), other)[0]
    path.write_bytes(other.get_path(key).read_bytes())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "cut short"),
        (lambda path: path.write_bytes(b""), "cut short"),
        (lambda path: path.write_text("nonsense" * 40), "cut short"),
        (_flip_a_bit, "checksum of .* is wrong"),
        (_copy_other_size, r"patch_tokens is not \[2, 3, 16\]"),
    ],
)
def test_cache__damaged_file_is_reported_and_made_again(tmp_path, capsys, batch_shapes, damage, reason):
    cache = _setup(tmp_path)
    images = _images([(30, 45)])
    keys = _extract(images, cache)
    path = cache.get_path(keys[0])
    # Copies: a file that is cut short under a memory map would end the process.
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}
    damage(path)
    with pytest.raises(ValueError, match=f"are damaged.*{path.name}.*({reason})"):
        cache.load(keys[0])
    capsys.readouterr()
    _extract(images, cache)
    assert batch_shapes[-1] == [(1, 3, 30, 45)] and len(batch_shapes) >= 2
    assert "are damaged" in capsys.readouterr().err
    again = load_file(path)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_cache__missing_file_names_its_path(tmp_path):
    cache = _setup(tmp_path)
    with pytest.raises(ValueError, match="No cached features at .*; start the run again"):
        cache.load(FeatureKey("0" * 16, 28, 28))


def test_cache__full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    cache = _setup(tmp_path)

    def fail(tensors, path, metadata):
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fit3d_ns.utils.tensor_files.save_file", fail)
    with pytest.raises(ValueError, match="cannot be written: the disk is full; free some space"):
        _extract(_images([(28, 28)]), cache)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_cache__folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "cache").write_text("")
    cache = _setup(tmp_path / "cache")
    with pytest.raises(
        ValueError, match="cannot be written: .*a file stands where a folder is needed; choose another path"
    ):
        _extract(_images([(28, 28)]), cache)


def test_cache__refuses_tokens_beyond_half_precision(tmp_path):
    cache = _setup(tmp_path)
    tokens = torch.full((2, 2, 16), 1e5)
    with pytest.raises(ValueError, match="too large for half precision"):
        cache.save(FeatureKey("0" * 16, 28, 28), tokens, torch.zeros(5, 16))


def test_cache__layout_is_sharded_and_separate_by_backbone_and_size(tmp_path):
    cache = _setup(tmp_path)
    images = _images([(30, 45), (44, 28)])
    keys = _extract(images, cache)
    other = FeatureCache(tmp_path, describe_backbone(BACKBONE, norm=False))
    assert not other.contains(keys[0])
    for key, size in zip(keys, ("30x45", "44x28"), strict=True):
        relative = cache.get_path(key).relative_to(tmp_path).parts
        assert relative[0] == cache.description.identity and "random" in relative[0]
        assert relative[1].startswith(size) and relative[2] == key.pixels_hash[:2]
        assert set(load_file(cache.get_path(key))) == {"patch_tokens", "prefix_tokens"}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_cache__backbone_without_prefix_tokens(tmp_path):
    description = describe_backbone("random:test_vit3", norm=False)
    assert describe_backbone("random:tiny_plain16").num_prefix_tokens == 1
    cache = FeatureCache(tmp_path, description)
    tokens = torch.ones(2, 2, description.embed_dim)
    prefix = torch.ones(description.num_prefix_tokens, description.embed_dim)
    key = FeatureKey("0" * 16, 2 * description.patch_size, 2 * description.patch_size)
    cache.save(key, tokens, prefix)
    assert torch.equal(load_file(cache.get_path(key))["prefix_tokens"], prefix.half())


def test_compute_feature_key__same_for_8_bit_and_float_forms_of_an_image():
    image = torch.arange(256, dtype=torch.uint8).repeat(3)[: 3 * 252].reshape(12, 21, 3)
    key = compute_feature_key(image)
    assert compute_feature_key(image.float() / 255) == key
    assert compute_feature_key(image.double() / 255) == key
    assert (key.height, key.width) == (12, 21)
    changed = image.clone()
    changed[5, 6, 1] += 1
    assert compute_feature_key(changed) != key
    assert compute_feature_key(image.reshape(21, 12, 3)) != key


def write_and_read(rank, folder):
    cache = FeatureCache(folder, describe_backbone("random:vit_tiny_patch16_224"))
    for _ in range(8):
        for index in range(6):
            key = FeatureKey(f"{index:016x}", 64, 64)
            cache.save(key, torch.full((4, 4, 192), float(index)), torch.zeros(1, 192))
            assert cache.load(key)[0, 0, 0] == index


def test_cache__processes_that_write_the_same_images_never_see_half_a_file(tmp_path):
    run_processes(write_and_read, str(tmp_path), 2)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 6
