"""The verifier: verifies the tokens that boards draft with a large target model, over HTTP.

    cli             `cloud-verifier`, one module per command
    replicas        several replicas at one address, with Ray Serve
    api             HTTP routes, admin API, OpenAPI, server
    engine          scheduler, sessions, rounds, admission, rate limits, authentication, rollout, metrics
    acceptance      acceptance of a draft by target versions
    model           forward passes: batch, KV cache, attention, CUDA graphs, LoRA, tensor parallelism, speculation
    draft_models    how a draft model and its target are assembled in PyTorch
    registry        target versions: contents, compatibility, and which of them is served

Each layer imports only layers below it.
"""
