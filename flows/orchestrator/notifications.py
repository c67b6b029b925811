"""The automation of `switchyard up` that sends notifications through a block of the user's Prefect."""

from __future__ import annotations

from prefect.client.orchestration import PrefectClient, get_client
from prefect.events import EventTrigger
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

from engines.home import host
from engines.notify import NOTIFICATION


async def put_notifications(block: str | None) -> str | None:
    """Make the automation for the plan's `[notify] prefect_block` (TYPE/NAME) anew, or take it away for None.

    One that was switched off in Prefect stays so. Returns what is to be done where Prefect has no such block.
    """
    name = f"switchyard: notifications of {host()}"
    async with get_client() as client:
        before = await client.read_automations_by_name(name)
        made = await _automation(client, name, block) if block else None
        for one in before:
            await client.delete_automation(one.id)
        if made is not None:
            made.enabled = all(one.enabled for one in before)
            await client.create_automation(made)
    if block and made is None:
        return (
            f"notify.prefect_block: Prefect has no block {block}, so nothing is sent there: make it under Blocks in "
            "Prefect, then start `switchyard up` again"
        )
    return None


async def _automation(client: PrefectClient, name: str, block: str) -> AutomationCore | None:
    type_slug, _, block_name = block.partition("/")
    try:
        document = await client.read_block_document_by_name(block_name, type_slug, include_secrets=False)
    except ObjectNotFound:
        return None
    send = SendNotification(
        block_document_id=document.id,
        subject="Switchyard: {{ event.payload.event }}",
        body="{{ event.payload.text }}",
    )
    trigger = EventTrigger(expect={NOTIFICATION}, match={"switchyard.host": host()})
    about = "Made by `switchyard up` for [notify] prefect_block; it is made anew at each start."
    return AutomationCore(name=name, description=about, tags=["switchyard"], trigger=trigger, actions=[send])
