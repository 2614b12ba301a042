"""A Trainer's system, card and code in; the model repository that `sailer push` makes of them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from sailer.data.schema import LabelSet
from sailer.hub.card import write_card
from sailer.hub.publishing import make_repository, publish
from sailer.training.arguments import SailerTrainingArguments
from sailer.training.card_facts import trainer_facts


class PublishingTrainer(Trainer):
    """
    Trainer that publishes as `sailer push` does, with our model card; the part of `SailerTrainer` that does so.

    Attributes:
        card: facts for the card that the Trainer cannot know, see `sailer.training.card_facts.trainer_facts`.
        card_facts: all that the card says, where the main job has put it together; else None.
    """

    args: SailerTrainingArguments
    label_set: LabelSet
    hub_model_id: str | None  # type: ignore[assignment]
    card: dict[str, Any]
    card_facts: dict[str, Any] | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that the arguments name, or see that it is there.

        Raises:
            sailer.hub.publishing.PushError: it cannot be written to.
        """
        if not self.is_world_process_zero():
            return
        wanted = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = make_repository(wanted, bool(private), token or self.args.hub_token).repo_id
        self.push_in_progress = None

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        folder: str | Path | None = None,
    ) -> None:
        """Write our card, README.md, and what it was rendered from, card.json, to the output folder.

        Its figures are those that were measured, so that `tasks`, `dataset_tags` and `dataset_args` say nothing more.

        Args:
            language: of the corpus.
            license: of the corpus, where nothing is known of it; the most restrictive one of all that the system is
                made of stands on the card. Without it the card of an unknown corpus says other, with a warning.
            tags: further ones.
            model_name: the title; by default the folder's name.
            finetuned_from: Hub id of the speech encoder.
            dataset: name of the corpus, as `sailer.data.load_corpus` has it.
            folder: where to; by default the output folder.
        """
        if not self.is_world_process_zero():
            return
        datasets = [dataset] if isinstance(dataset, str) else list(dataset or [])
        given = {"license": license, "audio_backbone": finetuned_from, "corpus": datasets[0] if datasets else None}
        facts = self.card_facts or trainer_facts(self, **self.card | {k: v for k, v in given.items() if v})
        more = {"language": language, "model_name": model_name, "datasets": datasets}
        more["tags"] = [tags] if isinstance(tags, str) else tags
        facts = facts | {key: value for key, value in more.items() if value}
        write_card(facts, Path(folder or self.args.output_dir))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Publish what `sailer push` does: the system with its code, card and handler, and nothing that holds pickles.

        Args:
            commit_message: of the one commit.
            blocking: only True.
            token: of the user who writes; by default that of `hf auth login`, or HF_TOKEN.
            revision: only the main branch, None.
            private: whether a new repository is private.
            card: as for `create_model_card`.

        Returns:
            `huggingface_hub.CommitInfo`; None in processes other than the first.

        Raises:
            sailer.hub.publishing.PushError: see `sailer.hub.publishing.push`; the message has the command that tries
                again.
            ValueError: `blocking` is false, or a `revision`.
        """
        if not blocking or revision is not None:
            raise ValueError("A system is pushed at once and to the main branch: leave out blocking and revision.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        is_private = bool(self.args.hub_private_repo if private is None else private)
        token = token or self.args.hub_token
        assert self.hub_model_id is not None, "init_hf_repo names it"
        return publish(self.args.output_dir, self.hub_model_id, is_private, token, commit_message or "End of training")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint holds pickles, and the finished system is pushed by `push_to_hub`."""
