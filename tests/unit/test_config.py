"""Settings: one definition, four spellings (struct, flag, environment, keyword)."""

import argparse

import pytest

from frontend.prompts import stream_options
from protocol import config as settings
from protocol.config import ConfigError, EngineConfig, ModelConfig, SchedulerConfig


def parse(*arguments: str, environ: dict[str, str] | None = None) -> EngineConfig:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    return settings.from_arguments(parser.parse_args(arguments), environ or {})


def test_every_field_has_a_flag_a_unit_and_an_environment_twin():
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    help_text = " ".join(parser.format_help().split())
    for name, (_section, _kind, _default, text) in settings.fields().items():
        assert text, name
        assert "--" + name.replace("_", "-") in help_text
        assert f"FOLOVLLM_{name.upper()}" in help_text


def test_flags_win_over_environment_over_defaults():
    environ = {"FOLOVLLM_MAX_NUM_SEQS": "5", "FOLOVLLM_DTYPE": "float32", "FOLOVLLM_ENABLE_PREFIX_CACHING": "0"}
    config = parse("--max-num-seqs", "7", environ=environ)
    assert config.scheduler.max_num_seqs == 7
    assert config.model.dtype == "float32"
    assert config.scheduler.enable_prefix_caching is False
    assert config.scheduler.scheduling_policy == "fcfs"


def test_arguments_give_the_config_back():
    config = settings.from_values({"max_num_seqs": 3, "enable_prefix_caching": False, "model": "/a b", "watermark": 0.25,
                                   "window": 2, "run_dir": "/tmp/x", "seed": 1})
    assert parse(*settings.to_arguments(config)) == config
    assert settings.to_arguments(EngineConfig()) == []


def test_no_quantization_has_a_name_and_vllms_none():
    assert EngineConfig().model.quantization == parse("--quantization", "none").model.quantization == "none"
    assert parse("--quantization", "none", environ={"FOLOVLLM_QUANTIZATION": "int8"}).model.quantization == "none"
    assert ModelConfig(quantization=None) == settings.from_values({"quantization": None}).model == ModelConfig(quantization="none")
    assert settings.to_arguments(settings.from_values({"quantization": None})) == []


def test_an_engines_stream_interval_has_the_clients_limit():
    assert parse("--stream-interval", str(2**20)).run.stream_interval == stream_options(2**20, None)["stream_interval"]


@pytest.mark.parametrize(("values", "message"), [
    ({"max_num_seqs": 0}, "max_num_seqs: was 0; allowed: an integer in [1, 4096]"),
    ({"max_num_seqs": "8"}, "max_num_seqs: was '8'; allowed: an integer in [1, 4096]"),
    ({"max_num_queued_reqs": 0}, "max_num_queued_reqs: was 0; allowed: an integer from 1"),
    ({"watermark": 0.9}, "watermark: was 0.9; allowed: a number in [0.0, 0.5]"),
    ({"enable_prefix_caching": 1}, "enable_prefix_caching: was 1; allowed: True or False"),
    ({"model": ""}, "model: was ''; allowed: a non-empty string"),
    ({"run_dir": ""}, "run_dir: was ''; allowed: a non-empty string"),
    ({"dtype": "int3"}, "dtype: was 'int3'; allowed: auto, float32, bfloat16, float16"),
    ({"window": 3}, "window: was 3"),
    ({"window": "x"}, "window: was 'x'"),
    ({"prompt_lookup_min": 5}, "prompt_lookup_min: was 5; allowed: at most prompt_lookup_max = 4"),
    ({"prompt_lookup_max": 1}, "prompt_lookup_min: was 2; allowed: at most prompt_lookup_max = 1"),
    ({"quantization": "int3"}, "quantization: was 'int3'; allowed: none, int8, int4"),
    ({"stream_interval": 2**20 + 1}, "stream_interval: was 1048577; allowed: an integer in [1, 1048576]"),
    ({"speculative": "eagle"}, "speculative: was 'eagle'; allowed: none, ngram"),
    ({"block_size": 16}, "block_size: was 16; allowed: 32"),
    ({"max_num_seq": 1}, "max_num_seq: no such setting; allowed: "),
])
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError) as caught:
        settings.from_values(values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("name", "value", "allowed"), [
    ("FOLOVLLM_WINDOW", "two", r"an integer in \[1, 2\]"), ("FOLOVLLM_ENABLE_PREFIX_CACHING", "maybe", "0, 1, true or false"),
    ("FOLOVLLM_WATERMARK", "x", r"a number in \[0.0, 0.5\]")])
def test_wrong_environment_is_named(name, value, allowed):
    with pytest.raises(ConfigError, match=f"{name}: was '{value}'; allowed: {allowed}"):
        parse(environ={name: value})


def test_keywords_reach_every_section():
    config = settings.from_values({"log_level": "info"}, EngineConfig(model=ModelConfig(dtype="float32"),
                                                                      scheduler=SchedulerConfig(max_num_seqs=2)))
    assert (config.model.dtype, config.scheduler.max_num_seqs, config.run.log_level) == ("float32", 2, "info")
