"""Networks are exported from the command line."""

from fmnist_jax.commands import export as export_command
from fmnist_jax.errors import VerificationError


def test_all_formats_are_written(finished, capsys):
    assert export_command.main([str(finished)]) == 0
    assert capsys.readouterr().out.count("tested against the network") == 3
    names = {path.name for path in (finished / "export").iterdir()}
    assert names == {"model.stablehlo", "model.json", "model.onnx", "model.safetensors"}


def test_a_failed_test_exits_with_1(finished, tmp_path, monkeypatch, capsys):
    def fail(classifier, folder):
        raise VerificationError("the export differs")

    monkeypatch.setitem(export_command.FORMATS, "onnx", fail)
    command = [str(finished), "--format", "onnx", "--output", str(tmp_path)]
    assert export_command.main(command) == 1
    assert "verification failed: the export differs" in capsys.readouterr().err
