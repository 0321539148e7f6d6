"""Lower variance for the same kernel, by theory: proposals for the projections, and exact rewritings of q . k.

No config and no command uses this folder. The package learns M instead. The one rewriting that was tried beside learned
features, shifts of q and k with their biases, gained nothing: docs/finetuning.md, "Tried in vain". No proposal was
tried beside a learned M: it is made from moments of M q and M k, which change while M learns.

Proposals are used by hand, with the moments of q' = sqrt(scale) M q and k' = sqrt(scale) M k per key/value head:

    covariance = proposal_covariance("log_variance", mean_q=..., mean_k=..., second_q=..., second_k=...)
    w, log_weights = transform_projections(draw_projections(key, m, d, num_heads=hkv), covariance)
    out = dark_attention(q, k, v, projections=w, log_weights=log_weights, geometry=M)

The rewritings (`identities`) serve other estimators: they leave biases, which `dark_attention` does not take.
"""
