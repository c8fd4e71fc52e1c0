"""The model: loading, its sites, the forward pass, attention, interventions, unembedding and circuits."""
