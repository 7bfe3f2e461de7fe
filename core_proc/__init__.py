"""The EngineCore process: requests, queue, scheduler, KV blocks.  No torch."""
