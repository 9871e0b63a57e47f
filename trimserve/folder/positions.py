"""Models whose positions begin after their pad id; light, since every encoder that is loaded asks."""

# Models that number positions by cumsum(ids != pad) * (ids != pad) + pad: in their graphs the pad id is
# both compared with ids and added to positions, so its compact id must equal it.
# fmt: off
PAD_POSITION_MODELS = frozenset({
    "altclip", "bridgetower", "camembert", "clap", "data2vec-text", "esm", "fsmt", "ibert",
    "kosmos-2", "kosmos-2.5", "layoutlmv3", "lilt", "longformer", "luke", "m2m_100", "markuplm",
    "mluke", "mpnet", "nllb-moe", "roberta", "roberta-prelayernorm", "seamless_m4t",
    "seamless_m4t_v2", "xlm-roberta", "xlm-roberta-xl", "xmod",
})
# fmt: on
