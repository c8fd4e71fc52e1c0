"""The embedded model, its sparse autoencoder and its labelled corpus: data, training, measurements.

world        people, places, words and ordinals of the invented world of the texts
corpus       documents in five domains with labelled spans          python -m workbench.experiments.demo_model.corpus
tokenizer    byte-level BPE that splits names and keeps ordinals whole
train        tokenizer and model                                    python -m workbench.experiments.demo_model.train
sae          sparse autoencoder on recorded activations             python -m workbench.experiments.demo_model.sae
phenomena    what a model shows on text held out from training
card         the model card, from measurements                      python -m workbench.experiments.demo_model.card
"""
