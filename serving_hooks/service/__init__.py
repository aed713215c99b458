"""`mope serve`: predictions over HTTP, for gateways, routers and schedulers that do not run Python of ours.

It lives below `serving_hooks` because it is a front end as the hooks have them: it shares their file of API keys, turns
of clients and names of metrics, which the runtime must not import. It imports neither training nor an engine. Clients
of it need `mope.client` alone, which belongs to the runtime.
"""
