"""A cached batch passes where x does, and is not a tensor."""

import pytest
import torch

from tl_modules import Classification, ConvNet, FeatureExtraction, LastStages, UserError
from tl_modules.batch import samples
from tl_modules.batch.cached import CachedActivations, align_cached
from tl_modules.cache.cut import Cut


def cached(net=None, count=3):
    net = net or ConvNet(4).eval()
    x = torch.rand(count, 3, 8, 8)
    cut = Cut(net, 1, x)
    return cut, x, CachedActivations(cut.record(x), cut, lambda n: x[:n])


def test_a_cached_batch_is_a_node():
    cut, x, batch = cached()
    assert len(batch) == samples.count(batch) == 3
    both = samples.concat([batch, batch])
    assert isinstance(both, CachedActivations)
    one, two = samples.split(both, [2, 4])
    assert (len(one), len(two)) == (2, 4)
    assert torch.equal(two.features()[1:], batch.features())
    assert torch.equal(batch.read(2), x[:2])
    assert isinstance(batch.to(torch.device("cpu")), CachedActivations)
    assert samples.alike([batch, one, CachedActivations(Cut(cut.backbone, 1, x.double()).record(x), cut)])
    assert not samples.alike([batch, cached()[2]])


def test_a_cached_batch_is_no_tensor():
    _, _, batch = cached()
    with pytest.raises(UserError, match=r"x.shape is not available"):
        _ = batch.shape
    with pytest.raises(UserError, match="mean cannot use x"):
        torch.mean(batch)


def test_what_is_not_cached_is_brought_to_the_same_cut():
    _, x, batch = cached()
    one, two = align_cached([batch, x])
    assert samples.alike([one, two])
    assert torch.equal(one.features(), two.features())
    assert align_cached([x, x])[0] is x
    half = batch.replace(samples.move(batch.tree, torch.float16))
    assert samples.alike(align_cached([half, x]))
    assert align_cached([batch, odd := torch.rand(3, 3, 16, 16)])[1] is odd  # its activations have another shape


class ReadsShapes(ConvNet):
    """Reads the shape of its images, as a backbone of one image size does."""

    def preprocess(self, images):
        assert images.shape[-1] > 0
        return super().preprocess(images)


@pytest.mark.parametrize("net", [ConvNet, ReadsShapes])
@pytest.mark.parametrize(("closed", "sides"), [(2, (8, 8)), (3, (8, 16))], ids=["channels", "sizes"])
def test_cached_domains_pass_together_where_they_would_uncached(net, closed, sides):
    torch.manual_seed(0)
    strategy = FeatureExtraction() if closed == 3 else LastStages(1)
    module = Classification(net(4), 3, finetuning=strategy, bottleneck=4).train()
    module.finetuning.apply(module, 0)
    xs = {"source": torch.rand(6, 1, sides[0], sides[0]), "target": torch.rand(6, 3, sides[1], sides[1])}
    raw = module.forward_domains({name: samples.Batch(x) for name, x in xs.items()})
    cuts = {name: Cut(module.backbone, closed, x, module.uses_pooled_features) for name, x in xs.items()}
    kept = {name: samples.Batch(CachedActivations(cut.record(xs[name]), cut)) for name, cut in cuts.items()}
    for name, output in module.forward_domains(kept).items():
        torch.testing.assert_close(output.output, raw[name].output, rtol=1e-4, atol=1e-5)
