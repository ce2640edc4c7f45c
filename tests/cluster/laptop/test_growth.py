"""What many nodes need, and the dry run that says it."""

import pytest

from cluster.laptop import fleet, growth


def test_what_grows_with_the_nodes_and_what_does_not():
    small, large = growth.Site(64), growth.Site(512)
    assert growth.copy_seconds(large) / growth.copy_seconds(small) == pytest.approx(511 / 63)
    assert growth.connect_seconds(large) == pytest.approx(16 * 15 * 0.14)  # 511 workers, 32 at a time
    assert growth.connect_seconds(growth.Site(1)) == 0
    rates = [growth.checkpoint(site, 10**9)[1] for site in (small, large)]
    assert all("12.0 GB" in text and "0.20 GB/s of the shared storage" in text for text in rates)
    assert dict(growth.describe(large))["preflight"].startswith("512 nodes at once; then the links")


@pytest.mark.parametrize("verb", ["up", "down", "status"])
def test_a_dry_run_says_it_and_connects_to_nothing(tmp_path, monkeypatch, capsys, verb):
    (tmp_path / "x.inventory.yaml").write_text("head: h\nworkers: [w1, w2]\ndiffers: {w2: {drained: true}}\n")
    monkeypatch.setattr("sys.argv", ["fleet", verb, str(tmp_path / "x.yaml"), "--dry-run"])
    monkeypatch.setattr(fleet, "Ssh", None)
    assert fleet.main() == 0
    said = capsys.readouterr().out
    assert "drained: true" in said and "1 first contacts" in said and "Ray's control" in said
