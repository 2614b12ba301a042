"""What each emotion of the synthetic corpus sounds like, says, is rated as and is mistaken for (all invented)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Emotion:
    """One emotion as it is spoken and as annotators take it.

    Attributes:
        pitch, pitch_range: shift of eSpeak's settings (0 to 99) from the speaker's own.
        rate, volume: factors on the speaker's own.
        attributes: arousal, valence, dominance on the 1-7 scale.
        mistaken_for: other emotions and how often, among mistakes, annotators choose them.
        also: secondary emotions that may come with it.
        sentences: words that carry it.
    """

    pitch: float
    pitch_range: float
    rate: float
    volume: float
    attributes: tuple[float, float, float]
    mistaken_for: dict[str, float]
    also: tuple[str, ...]
    sentences: tuple[str, ...]


EMOTIONS: dict[str, Emotion] = {
    "Angry": Emotion(
        pitch=5,
        pitch_range=25,
        rate=1.25,
        volume=1.45,
        attributes=(6.0, 2.2, 5.9),
        mistaken_for={"Disgust": 0.3, "Contempt": 0.25, "Neutral": 0.2, "Surprise": 0.1, "Other": 0.15},
        also=("Frustrated", "Annoyed"),
        sentences=(
            "I am so angry about this!",
            "How dare you talk to me like that!",
            "Stop it, I have had enough!",
            "You broke your promise again!",
            "This makes me furious!",
            "Get out of my office now!",
            "I will not be treated this way!",
            "You lied to all of us!",
        ),
    ),
    "Contempt": Emotion(
        pitch=-20,
        pitch_range=15,
        rate=0.92,
        volume=0.85,
        attributes=(3.6, 2.7, 5.4),
        mistaken_for={"Neutral": 0.35, "Disgust": 0.25, "Angry": 0.2, "Happy": 0.08, "Other": 0.12},
        also=("Annoyed", "Disgust"),
        sentences=(
            "Well, what did you expect from him?",
            "Oh please, even a child could do better.",
            "As if his opinion mattered.",
            "They call that a plan, how pathetic.",
            "Sure, because you are such an expert.",
            "That is beneath me.",
            "What a ridiculous little man.",
            "I would never lower myself to that.",
        ),
    ),
    "Disgust": Emotion(
        pitch=-24,
        pitch_range=30,
        rate=0.72,
        volume=1.1,
        attributes=(4.3, 2.0, 4.6),
        mistaken_for={"Contempt": 0.3, "Angry": 0.3, "Sad": 0.15, "Neutral": 0.1, "Other": 0.15},
        also=("Annoyed", "Disappointed"),
        sentences=(
            "This smells absolutely revolting.",
            "Ugh, there is mould all over it.",
            "That is disgusting, take it away.",
            "I feel sick just looking at it.",
            "The kitchen was filthy and rotten.",
            "How can anybody eat this slime?",
            "That was a vile thing to do.",
            "There is a hair in my soup, yuck.",
        ),
    ),
    "Fear": Emotion(
        pitch=32,
        pitch_range=-30,
        rate=1.38,
        volume=0.65,
        attributes=(5.4, 2.4, 2.1),
        mistaken_for={"Sad": 0.3, "Surprise": 0.3, "Neutral": 0.15, "Angry": 0.1, "Other": 0.15},
        also=("Concerned", "Confused"),
        sentences=(
            "Please do not leave me alone here.",
            "I am scared of what happens next.",
            "Did you hear that noise outside?",
            "Somebody is following us.",
            "I am afraid it will get worse.",
            "We are in danger, hurry.",
            "My hands are shaking, I am terrified.",
            "What if they find us?",
        ),
    ),
    "Happy": Emotion(
        pitch=15,
        pitch_range=35,
        rate=1.1,
        volume=1.15,
        attributes=(5.3, 6.2, 5.0),
        mistaken_for={"Neutral": 0.45, "Surprise": 0.3, "Contempt": 0.08, "Other": 0.17},
        also=("Amused", "Excited"),
        sentences=(
            "I am so happy for you both!",
            "What a wonderful day this is!",
            "We won, we really won!",
            "That was the best party ever.",
            "I love this song so much.",
            "Great news, I got the job!",
            "It is lovely to see you again.",
            "The children laughed all afternoon.",
        ),
    ),
    "Neutral": Emotion(
        pitch=0,
        pitch_range=0,
        rate=1.0,
        volume=1.0,
        attributes=(3.9, 4.1, 4.2),
        mistaken_for={"Happy": 0.35, "Sad": 0.22, "Contempt": 0.13, "Angry": 0.1, "Surprise": 0.05, "Other": 0.15},
        also=("Concerned",),
        sentences=(
            "The report has twelve pages.",
            "Turn left at the second light.",
            "The office opens at nine.",
            "We moved the desk to the window.",
            "The form needs a signature.",
            "It is about ten miles from here.",
            "The second chapter is on plants.",
            "Then you press the green button.",
        ),
    ),
    "Sad": Emotion(
        pitch=-18,
        pitch_range=-35,
        rate=0.72,
        volume=0.5,
        attributes=(2.5, 2.1, 2.8),
        mistaken_for={"Neutral": 0.45, "Fear": 0.2, "Disgust": 0.08, "Angry": 0.1, "Other": 0.17},
        also=("Depressed", "Disappointed"),
        sentences=(
            "I miss her every single day.",
            "I lost everything I had.",
            "Nobody came to the funeral.",
            "I just want to cry.",
            "He never even said goodbye.",
            "It hurts to be this lonely.",
            "I am sorry, I failed you.",
            "The house feels empty without him.",
        ),
    ),
    "Surprise": Emotion(
        pitch=36,
        pitch_range=50,
        rate=0.92,
        volume=1.3,
        attributes=(5.6, 4.6, 4.2),
        mistaken_for={"Happy": 0.4, "Fear": 0.22, "Neutral": 0.18, "Other": 0.2},
        also=("Excited", "Confused"),
        sentences=(
            "Wow, I did not see that coming!",
            "What, are you serious?",
            "Oh my goodness, is that really you?",
            "No way, when did that happen?",
            "I cannot believe my eyes!",
            "You never told me you had a twin!",
            "Suddenly the lights went on!",
            "Really, all of it for free?",
        ),
    ),
    "Other": Emotion(
        pitch=-4,
        pitch_range=-15,
        rate=1.2,
        volume=0.9,
        attributes=(4.2, 3.7, 4.0),
        mistaken_for={"Neutral": 0.4, "Happy": 0.2, "Sad": 0.15, "Surprise": 0.15, "Angry": 0.1},
        also=("Confused", "Concerned", "Frustrated"),
        sentences=(
            "Hmm, I am not sure I follow.",
            "Could you say that once more?",
            "I am so bored of waiting.",
            "Let me think about it for a while.",
            "Maybe, it depends on so much.",
            "I suppose we could try.",
        ),
    ),
}

# Words that say nothing of the emotion: each sentence is filled with one of each kind.
CARRIERS = (
    "{person} is coming over on {day}.",
    "I talked to {person} about the {thing}.",
    "The {thing} is in the {place}.",
    "They put the {thing} on the table.",
    "{person} called me on {day}.",
    "We are going to the {place} with {person}.",
    "You left the {thing} at the {place}.",
    "I saw {person} in the {place}.",
    "On {day} the {thing} arrived.",
    "{person} wants to show me the {thing}.",
)
FILLERS = {
    "person": ("My brother", "The doctor", "Our neighbour", "The teacher", "My boss", "Her cousin"),
    "day": ("Monday", "Tuesday", "Thursday", "Friday", "Sunday"),
    "thing": ("letter", "bicycle", "blue coat", "camera", "ticket", "box"),
    "place": ("garden", "station", "library", "kitchen", "market"),
}

# Clips per class in the challenge's training and development sets (paper, Table 1); None: no agreement.
TRAIN_COUNTS: dict[str | None, int] = {
    **{"Neutral": 29243, "Happy": 16717, "Sad": 6306, "Disgust": 1432, "Angry": 6731, "Contempt": 2495},
    **{"Fear": 1120, "Surprise": 1120, "Other": 2948, None: 15932},
}
DEVELOPMENT_COUNTS: dict[str | None, int] = {
    **{"Neutral": 7423, "Happy": 6344, "Sad": 2341, "Disgust": 542, "Angry": 5836, "Contempt": 1459},
    **{"Fear": 326, "Surprise": 987, "Other": 642, None: 6061},
}
