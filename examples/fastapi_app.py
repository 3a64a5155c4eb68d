"""A web application with a model inside. FastAPI is yours to install: pip install fastapi uvicorn

uvicorn examples.fastapi_app:app        # from a clone; with BUNDLE=DIR your own model
curl localhost:8000/story -H 'content-type: application/json' -d '{"start": "A farmer"}'

 had to be a some.  He had a great time, ...     (the words come one by one; 400 when refused)
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from edge_sdk import FleetError, SlmSession
from examples.ready import ready


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with SlmSession(ready("slm-a")) as app.state.session:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/story")  # not async below: FastAPI gives each request a thread of its own
def story(start: Annotated[str, Body(embed=True)]) -> StreamingResponse:
    answer = app.state.session.stream(start, max_tokens=40, time_s=20)
    return StreamingResponse(answer, media_type="text/plain; charset=utf-8")


@app.exception_handler(FleetError)
def refused(request: Request, exc: FleetError) -> JSONResponse:
    return JSONResponse({"detail": str(exc)}, status_code=400)
