//! Why a provider has no answer.

use std::fmt;

#[derive(Debug)]
pub enum Failure {
    /// A model file is missing, cut, or of a kind that the engine cannot load.
    Load(String),
    /// No model has this name.
    Unknown(String),
    /// The model was unloaded; `reload` it first.
    Unloaded(String),
    /// The request is at fault; nothing was generated.
    Refused(String),
    /// The engine or the model failed; the request may be sent again.
    Engine(String),
    /// The generation ended without a reason that is known; None when the engine's thread ended.
    Unfinished(Option<String>),
    /// The model still called tools after this many rounds.
    Rounds(usize),
}

impl Failure {
    /// The first line says what is wrong; what follows is a backtrace.
    pub(crate) fn load(error: impl fmt::Display) -> Self {
        Self::Load(error.to_string().lines().next().unwrap_or_default().to_owned())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load(why) => write!(out, "the model cannot be loaded: {why}"),
            Self::Unknown(id) => write!(out, "no model is called {id}"),
            Self::Unloaded(id) => write!(out, "{id} is unloaded; reload it first"),
            Self::Refused(why) => write!(out, "request refused: {why}"),
            Self::Engine(why) => write!(out, "the engine failed: {why}"),
            Self::Unfinished(Some(reason)) => write!(out, "the generation ended with {reason}"),
            Self::Unfinished(None) => write!(out, "the engine's thread ended"),
            Self::Rounds(rounds) => write!(out, "no answer after {rounds} rounds of tool calls"),
        }
    }
}

impl std::error::Error for Failure {}

impl From<mistralrs::error::Error> for Failure {
    fn from(error: mistralrs::error::Error) -> Self {
        match error {
            mistralrs::error::Error::RequestValidation(why) => Self::Refused(why),
            mistralrs::error::Error::Channel(_) => Self::Unfinished(None),
            other => Self::Engine(other.to_string()),
        }
    }
}
