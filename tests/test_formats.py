import pytest
import torch
from reference_formats import INF, NAN, gaussian

from sologpt.matmuls import formats
from sologpt.matmuls.block_formats import BlockFormat
from sologpt.matmuls.elements import BYTE, E2M1, E4M3, E5M2, TRIT
from sologpt.matmuls.formats import Encoded, Format


def bytes_of_rows(x):
    """The plain formula."""
    size = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return (x * (127 / size)).round().to(torch.int8), size / 127


ROWS, COLUMNS = Format(BYTE, 'row'), Format(BYTE, 'column')


def test_int8_rows_and_columns():
    x = gaussian(37, 24) * torch.exp2(6 * gaussian(37, 1, seed=1))
    x[5] = 0
    x[6, :3] = torch.tensor([254.0, 1.0, 3.0])  # ties, to even: codes 127, 0 (of 0.5), 2 (of 1.5)
    x[6, 3:] = 0
    codes, scale = bytes_of_rows(x)
    assert codes[6, :3].tolist() == [127, 0, 2]
    # a view whose rows are columns of another in memory, and one that is contiguous nowhere
    spread = torch.zeros(74, 48)
    spread[::2, ::2] = x
    for view in (x, x.mT.contiguous().mT, spread[::2, ::2]):
        encoded = ROWS.encode(view)
        assert encoded.values.dtype == torch.int8
        assert torch.equal(encoded.values, codes) and torch.equal(encoded.scale, scale)
        encoded = COLUMNS.encode(view.mT).mT
        assert torch.equal(encoded.values, codes) and torch.equal(encoded.scale, scale)
    assert (encoded.decode() - x).abs().le(encoded.scale * 0.5001).all() and encoded.scale.shape == (37, 1)
    assert ROWS.mT == COLUMNS and COLUMNS.mT == ROWS and Format(E4M3).mT == Format(E4M3)
    half = ROWS.encode(x.bfloat16())
    assert torch.equal(half.values, bytes_of_rows(x.bfloat16().float())[0])


each_layout = pytest.mark.parametrize('transposed', [False, True])
each_format = pytest.mark.parametrize('format', [
    ROWS, COLUMNS, Format(E4M3), Format(E2M1, 'row'), Format(E4M3, 'column'), Format(TRIT, mean=True),
    Format(E2M1, 'row', outliers=0.9), BlockFormat(E2M1, (1, 32)), BlockFormat(E2M1, (1, 16), 'e4m3')], ids=str)


@each_format
@each_layout
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_what_is_encoded_stays_as_it_was(format, transposed, dtype):
    """Where nothing has to be converted, a view is what would be written to: of the weights, say."""
    x = gaussian(20, 32).to(dtype)
    if transposed:
        x = x.mT.contiguous().mT
    before = x.clone()
    format.encode(x)
    format.encode(x, gaussian(1, 32).exp())
    assert torch.equal(x, before)


@each_format
@each_layout
def test_times_is_multiplied_first(format, transposed):
    x, times = gaussian(20, 32).bfloat16(), gaussian(1, 32, seed=1).exp()
    if transposed:
        x = x.mT.contiguous().mT
    folded, first = format.encode(x, times), format.encode(x * times)
    assert torch.equal(folded.values.float(), first.values.float())
    assert folded.scale is first.scale is None or torch.equal(folded.scale, first.scale)
    assert not torch.equal(folded.decode(), format.encode(x).decode())


@pytest.mark.parametrize('format', [ROWS, COLUMNS])
def test_pieces_are_the_whole(format, monkeypatch):
    x, times = gaussian(37, 24), gaussian(1, 24, seed=1).exp()
    views = [x, x.mT.contiguous().mT]
    whole = [format.encode(view, t) for view in views for t in (None, times)]
    monkeypatch.setattr(formats, 'CACHED', 100)
    assert len(formats.row_pieces(x)) == 10
    pieces = [format.encode(view, t) for view in views for t in (None, times)]
    for a, b in zip(whole, pieces, strict=True):
        assert torch.equal(a.values, b.values) and torch.equal(a.scale, b.scale)
    monkeypatch.setattr(formats, 'CACHED', 1)  # a row is larger
    assert len(formats.row_pieces(x)) == 37


@pytest.mark.parametrize('bad', [NAN, INF, -INF])
@pytest.mark.parametrize('element', [BYTE, E4M3, E2M1])
def test_nan_and_infinity_spoil_their_row_alone(bad, element):
    x = gaussian(5, 16)
    good = Format(element, 'row').encode(x).decode()
    x[2, 3] = bad
    for view in (x, x.mT.contiguous().mT):
        decoded = Format(element, 'row').encode(view).decode()
        assert not decoded[2].isfinite().any()
        others = [0, 1, 3, 4]
        assert torch.equal(decoded[others], good[others])
        assert not Format(element, 'column').encode(view.mT).decode()[:, 2].isfinite().any()
        assert not Format(element).encode(view).decode().isfinite().any()


@pytest.mark.parametrize('element', [E4M3, E5M2])
@pytest.mark.parametrize('shared, amax', [('tensor', lambda x: x.abs().max()),
                                          ('row', lambda x: x.abs().amax(1, keepdim=True)),
                                          ('column', lambda x: x.abs().amax(0, keepdim=True))])
def test_fp8_brings_the_largest_to_the_largest(element, shared, amax):
    x = gaussian(16, 24) * torch.exp2(3 * gaussian(16, 1, seed=1))
    encoded = Format(element, shared).encode(x)
    size = amax(x)
    assert encoded.values.dtype == element.dtype
    assert torch.equal(encoded.values.float(), (x * (element.max / size)).clamp(-element.max, element.max)
                       .to(element.dtype).float())
    torch.testing.assert_close(encoded.scale, size / element.max, rtol=1e-6, atol=0)
    assert torch.equal(amax(encoded.values.float()), torch.full_like(size, element.max))
    assert (Format(element, shared).encode(torch.zeros(4, 4)).decode() == 0).all()


def test_ternary_is_rounded_by_the_mean():
    w = gaussian(16, 24) * 0.02
    mean = w.abs().mean()
    encoded = Format(TRIT, mean=True).encode(w)
    assert encoded.values.dtype == torch.int8
    assert torch.equal(encoded.values.float(), (w / mean).round().clamp(-1, 1))
    assert set(encoded.values.flatten().tolist()) == {-1, 0, 1}
    torch.testing.assert_close(encoded.scale, mean, rtol=1e-6, atol=0)
    tiny = Format(TRIT, mean=True).encode(torch.full((2, 2), 1e-6))  # the mean is 1e-5 at least
    assert (tiny.values == 0).all() and tiny.scale == pytest.approx(1e-5)


@pytest.mark.parametrize('shared', ['row', 'column'])
def test_outliers_stay_what_they_are(shared):
    x = gaussian(40, 50)
    x[3, 7], x[9, 9] = 80.0, -100.0
    bound = x.abs().flatten().sort().values[1979]  # the 0.99 quantile of 2000
    outliers = x.abs() > bound
    assert outliers.sum() == 20
    decoded = Format(E2M1, shared, outliers=0.99).encode(x).decode()
    torch.testing.assert_close(decoded[outliers], x[outliers], rtol=1e-6, atol=0)
    plain = Format(E2M1, shared).encode(x.clamp(-bound, bound)).decode()
    assert torch.equal(decoded[~outliers], plain[~outliers])  # the others' scale does not know of them


def test_the_quantile_is_torchs():
    x = gaussian(1000, seed=7)
    for q in (0.0, 0.001, 0.5, 0.99, 0.9901, 1.0):
        # torch's ranks are spread over n - 1 intervals: the value at or next to its own
        low, high = (torch.quantile(x, max(0.0, min(1.0, q + d))) for d in (-0.0011, 0.0011))
        assert low <= formats._quantile(x, q) <= high and (x == formats._quantile(x, q)).any()


def test_encoded_is_values_times_scale():
    values, scale = gaussian(3, 4), gaussian(3, 1)
    for s in (None, scale, scale[0, 0]):
        encoded = Encoded(values, s)
        assert torch.equal(encoded.decode(), values if s is None else values * s)
        assert torch.equal(encoded.mT.decode(), encoded.decode().mT)
