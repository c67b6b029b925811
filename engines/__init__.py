"""Engines: find, launch, talk to, watch and stop inference servers. No Prefect, no SQL, no judgement."""
