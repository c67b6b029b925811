"""What a person asked of a migration beyond its plan."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from engines.errors import BadInput
from migrations.plan import ModelPlan, Plan


class Orders(BaseModel):
    """What a person asked of a migration beyond its plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field((), description="migrate these models only; all of the plan's without")
    override: tuple[str, ...] = Field((), description="models that migrate although phase 1 has not opened their gate")
    who: str = Field("", description="name of the person who decides that; recorded")
    reason: str = Field("", description="why; recorded")
    without_canary: bool = Field(False, description="move all traffic at once; recorded")
    without_rehearsal: bool = Field(False, description="do not rehearse the fallback first; recorded")

    def chosen(self, plan: Plan) -> list[ModelPlan]:
        """The models that are migrated."""
        return [plan.model(name) for name in self.models] or list(plan.models)

    def checked(self, plan: Plan) -> Orders:
        """These orders. Raises BadInput for an unknown model, and for a decision without a name and a reason."""
        for model_id in (*self.models, *self.override):
            plan.model(model_id)
        decides = bool(self.override) or self.without_canary or self.without_rehearsal
        if decides and not (self.who.strip() and self.reason.strip()):
            raise BadInput(
                "a decision against the evidence is recorded with a name and a reason: add --who and --reason"
            )
        return self
