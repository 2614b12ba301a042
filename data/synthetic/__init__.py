"""The synthetic corpus: eSpeak NG voices that sound and speak by emotion, and annotators who disagree."""

from sailer.data.synthetic.corpus import make_corpus, simulate_votes

__all__ = ["make_corpus", "simulate_votes"]
