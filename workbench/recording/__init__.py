"""Recording a model into a store: plan, write, finish; estimates and a cache of recordings."""
