"""The configuration of a run and of a suite: schema, rules between keys, loading, identity."""

from replication.config.checks import gain_contradictions
from replication.config.identity import (
    MACHINE_KEYS,
    SEED_KEYS,
    differences,
    flatten,
    machine_cut,
    neutral_values,
    refuse_differences,
    sampling_settings,
    scientific,
    scientific_hash,
    to_dict,
    to_yaml,
    without_neutral,
    without_seeds,
)
from replication.config.load import (
    arm_keys,
    config_root,
    declared_keys,
    find_cluster,
    find_config,
    find_plugin,
    help_of_keys,
    inlined,
    load_cell,
    load_run,
    load_suite,
    plugin_layer,
    set_by_flags,
)
from replication.config.reading import Keys, Layer, build
from replication.config.schema import (
    AnalysisConfig,
    ClusterConfig,
    DataConfig,
    DivergedRule,
    GenerationConfig,
    LayerGainConfig,
    ModelConfig,
    RunConfig,
    SlurmConfig,
    SourceConfig,
    SuiteConfig,
    TokenGainConfig,
    TokenizerConfig,
    TrainingConfig,
)

__all__ = ["AnalysisConfig", "ClusterConfig", "DataConfig", "DivergedRule", "LayerGainConfig", "ModelConfig"]
__all__ += ["RunConfig", "SlurmConfig", "SourceConfig", "SuiteConfig", "TokenGainConfig", "TokenizerConfig"]
__all__ += ["GenerationConfig", "TrainingConfig"]
__all__ += ["MACHINE_KEYS", "SEED_KEYS", "Keys", "Layer", "arm_keys", "build", "config_root", "declared_keys"]
__all__ += ["differences", "find_cluster", "find_config", "find_plugin", "flatten", "gain_contradictions"]
__all__ += ["help_of_keys", "inlined", "load_cell", "load_run", "load_suite", "machine_cut", "neutral_values"]
__all__ += ["plugin_layer", "refuse_differences", "sampling_settings", "scientific", "scientific_hash"]
__all__ += ["set_by_flags", "to_dict", "to_yaml", "without_neutral", "without_seeds"]
