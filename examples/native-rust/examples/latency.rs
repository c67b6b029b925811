//! The same prompts to the model in this process and to the program `mistralrs` beside it, in turns.
//! `cargo run --release --example latency -- MODEL.gguf PATH/TO/mistralrs [ROUNDS]`

use std::error::Error;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use mistralrs::{RequestBuilder, TextMessageRole};
use serde_json::{json, Value};
use switchyard_native_example::{Provider, Source};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

type Outcome<T> = Result<T, Box<dyn Error>>;
const TOKENS: usize = 32;

/// Milliseconds to the first piece of text, and between pieces.
struct Times {
    first: f64,
    gap: f64,
}

fn times(start: Instant, pieces: &[Instant]) -> Outcome<Times> {
    let [first, .., last] = pieces else { return Err("fewer than two pieces of text".into()) };
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1000.0;
    Ok(Times { first: ms(start, *first), gap: ms(*first, *last) / (pieces.len() - 1) as f64 })
}

async fn inside(provider: &Provider, prompt: &str) -> Outcome<Times> {
    let request = RequestBuilder::new().add_message(TextMessageRole::User, prompt).set_sampler_max_len(TOKENS);
    let (start, mut pieces) = (Instant::now(), Vec::new());
    let hear = |_: &str| {
        pieces.push(Instant::now());
        true
    };
    provider.generate("model", request, hear).await?;
    times(start, &pieces)
}

async fn beside(port: u16, prompt: &str) -> Outcome<Times> {
    let body = json!({
        "model": "default", "stream": true, "max_tokens": TOKENS, "temperature": 0,
        "messages": [{ "role": "user", "content": prompt }],
    });
    let body = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let (start, mut pieces) = (Instant::now(), Vec::new());
    let mut connection = TcpStream::connect(("127.0.0.1", port)).await?;
    connection.set_nodelay(true)?;
    connection.write_all((head + &body).as_bytes()).await?;
    let mut lines = BufReader::new(connection).lines();
    while let Some(line) = lines.next_line().await? {
        let Some(data) = line.strip_prefix("data:").map(str::trim_start) else { continue };
        if data == "[DONE]" {
            break;
        }
        let chunk: Value = serde_json::from_str(data)?;
        if chunk["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty()) {
            pieces.push(Instant::now());
        }
    }
    times(start, &pieces)
}

async fn serve(program: &str, gguf: &PathBuf) -> Outcome<(Child, u16)> {
    let port = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port();
    let child = Command::new(program)
        .args(["serve", "--host", "127.0.0.1", "--port", &port.to_string(), "--format", "gguf", "--cpu"])
        .args(["--max-seqs", "1", "--prefix-cache-n", "0"])
        .arg("-m")
        .arg(gguf.parent().ok_or("the model has no folder")?)
        .arg("-f")
        .arg(gguf.file_name().ok_or("the model is no file")?)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let late = Instant::now() + Duration::from_secs(120);
    while beside(port, "Hello?").await.is_err() {
        if Instant::now() > late {
            return Err(format!("{program} was not ready in 120 s").into());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok((child, port))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

fn show(what: &str, all: &[Times]) {
    let first = median(all.iter().map(|times| times.first).collect());
    let gap = median(all.iter().map(|times| times.gap).collect());
    println!("{what}: first text {first:.1} ms, gap {gap:.2} ms (medians of {})", all.len());
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(gguf), Some(program)) = (arguments.next(), arguments.next()) else {
        return Err("usage: latency MODEL.gguf PATH/TO/mistralrs [ROUNDS]".into());
    };
    let rounds: usize = arguments.next().map_or(Ok(10), |text| text.parse())?;
    let gguf = std::fs::canonicalize(gguf)?;
    let mut provider = Provider::default();
    provider.load(&Source { id: "model".to_owned(), gguf: gguf.clone(), template: None }).await?;
    let (mut child, port) = serve(&program, &gguf).await?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let prompt = format!("{round}: {}Describe this list.", "one two three four five six seven eight ".repeat(16));
        if round % 2 == 0 {
            ours.push(inside(&provider, &prompt).await?);
            theirs.push(beside(port, &prompt).await?);
        } else {
            theirs.push(beside(port, &prompt).await?);
            ours.push(inside(&provider, &prompt).await?);
        }
    }
    child.kill().await?;
    show("in this process", &ours);
    show("beside it", &theirs);
    Ok(())
}
