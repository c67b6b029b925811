//! mistral.rs inside this process: several GGUF models, one generation at a time.

mod failure;
mod tools;

use std::collections::BTreeMap;
use std::path::PathBuf;

use either::Either;
use mistralrs::{GgufModelBuilder, Model, RequestBuilder, Response, ToolCallResponse, Usage};
use tokio::sync::Mutex;

pub use failure::Failure;
pub use tools::{shaped, Call, Function};

/// A model file, and the name that requests give it.
pub struct Source {
    pub id: String,
    pub gguf: PathBuf,
    /// A Jinja file in place of the GGUF's own template, such as one that shows tools.
    pub template: Option<PathBuf>,
}

/// What one generation gave. `finish` is None when the listener left.
#[derive(Debug, Default)]
pub struct Turn {
    pub text: String,
    pub calls: Vec<ToolCallResponse>,
    pub finish: Option<String>,
    pub usage: Option<Usage>,
}

struct Loaded {
    model: Model,
    name: String, // the engine's own: the folder's
}

/// Each model is an engine of its own: one engine of several models refuses two files of one folder (0.8.1).
#[derive(Default)]
pub struct Provider {
    models: BTreeMap<String, Loaded>,
    turn: Mutex<()>, // on the CPU two prompts of equal length in one step fail
}

impl Provider {
    /// Load one more model. It blocks its thread while it reads: seconds to minutes.
    pub async fn load(&mut self, source: &Source) -> Result<(), Failure> {
        let model = gguf(source)?.build().await.map_err(Failure::load)?;
        let name = model.get_default_model_id()?.ok_or_else(|| Failure::load("no model in it"))?;
        self.models.insert(source.id.clone(), Loaded { model, name });
        Ok(())
    }

    /// Every model's name, and whether its weights are in memory.
    pub fn models(&self) -> Result<Vec<(String, bool)>, Failure> {
        self.models.iter().map(|(id, at)| Ok((id.clone(), at.model.is_model_loaded(&at.name)?))).collect()
    }

    /// Generate; each piece of text goes to `hear`, which ends the generation by returning false.
    pub async fn generate(
        &self,
        id: &str,
        request: RequestBuilder,
        mut hear: impl FnMut(&str) -> bool,
    ) -> Result<Turn, Failure> {
        let _turn = self.turn.lock().await;
        let Loaded { model, name } = self.ready(id)?;
        let mut stream = model.stream_chat_request_with_model(request, Some(name)).await?;
        let mut turn = Turn::default();
        while let Some(response) = stream.next().await {
            let chunk = match response {
                Response::Chunk(chunk) => chunk,
                Response::ValidationError(why) => return Err(Failure::Refused(why.to_string())),
                Response::InternalError(why) => return Err(Failure::Engine(why.to_string())),
                Response::ModelError(why, _) => return Err(Failure::Engine(why)),
                _ => continue,
            };
            turn.usage = chunk.usage.or(turn.usage);
            let Some(choice) = chunk.choices.into_iter().next() else { continue };
            turn.calls.extend(choice.delta.tool_calls.unwrap_or_default());
            turn.finish = choice.finish_reason.or(turn.finish);
            let text = choice.delta.content.unwrap_or_default();
            turn.text.push_str(&text);
            if !text.is_empty() && !hear(&text) {
                return Ok(turn); // dropping the stream cancels
            }
        }
        match turn.finish.as_deref() {
            Some("stop" | "length" | "tool_calls") => Ok(turn),
            other => Err(Failure::Unfinished(other.map(str::to_owned))), // None: the engine's thread died
        }
    }

    /// The whole answer; streamed inside, since a call that is not streamed cannot be cancelled.
    pub async fn chat(&self, id: &str, request: RequestBuilder) -> Result<Turn, Failure> {
        self.generate(id, request, |_| true).await
    }

    pub async fn tokens(&self, id: &str, text: &str) -> Result<Vec<u32>, Failure> {
        let Loaded { model, name } = self.ready(id)?;
        let text = Either::Right(text.to_owned());
        Ok(model.tokenize_with_model(text, None, false, false, None, Some(name)).await?)
    }

    /// Give the weights back; a generation that runs ends first.
    pub async fn unload(&self, id: &str) -> Result<(), Failure> {
        let _turn = self.turn.lock().await;
        let Loaded { model, name } = self.known(id)?;
        if model.is_model_loaded(name)? {
            model.unload_model(name)?;
        }
        Ok(())
    }

    /// Read the weights again. A model that is loaded is left alone: the engine calls it ModelNotFound (0.8.1).
    pub async fn reload(&self, id: &str) -> Result<(), Failure> {
        let _turn = self.turn.lock().await;
        let Loaded { model, name } = self.known(id)?;
        if !model.is_model_loaded(name)? {
            model.reload_model(name).await?;
        }
        Ok(())
    }

    fn known(&self, id: &str) -> Result<&Loaded, Failure> {
        self.models.get(id).ok_or_else(|| Failure::Unknown(id.to_owned()))
    }

    fn ready(&self, id: &str) -> Result<&Loaded, Failure> {
        let loaded = self.known(id)?;
        match loaded.model.is_model_loaded(&loaded.name)? {
            true => Ok(loaded),
            false => Err(Failure::Unloaded(id.to_owned())), // a request would load it, unasked
        }
    }
}

fn gguf(source: &Source) -> Result<GgufModelBuilder, Failure> {
    let (Some(folder), Some(file)) = (source.gguf.parent(), source.gguf.file_name()) else {
        return Err(Failure::Load(format!("{} is no file", source.gguf.display())));
    };
    if !source.gguf.is_file() {
        return Err(Failure::Load(format!("{} is no file", source.gguf.display())));
    }
    let builder = GgufModelBuilder::new(folder.display(), vec![file.to_string_lossy()])
        .with_max_num_seqs(1)
        .with_prefix_cache_n(None); // on the CPU it keeps every prompt
    Ok(match &source.template {
        Some(template) => builder.with_jinja_explicit(template.display().to_string()),
        None => builder,
    })
}
