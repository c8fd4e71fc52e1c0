"""The embedded model, its sparse autoencoder and its labelled corpus: how they are made and what they show.

world        people, places, words and ordinals of the little world that the texts are about
corpus       documents in five domains with labelled spans          python -m experiments.demo.corpus
tokenizer    byte-level BPE that splits names and keeps ordinals whole
train        tokenizer and model                                    python -m experiments.demo.train
sae          sparse autoencoder on recorded activations             python -m experiments.demo.sae
phenomena    what a model shows on text held out from training
card         the model card, from measurements                      python -m experiments.demo.card
"""
