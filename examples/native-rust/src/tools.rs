//! The tool loop: run the functions that a model calls, until it answers in text.

use std::collections::HashMap;

use mistralrs::{Constraint, Function as Schema, RequestBuilder, TextMessageRole, Tool, ToolChoice, ToolType};
use serde_json::{json, Value};

use crate::{Failure, Provider, Turn};

/// A function that the model may call. What `run` refuses goes to the model as the call's result.
pub struct Function {
    pub name: String,
    pub description: String,
    /// JSON schema of its arguments, an object.
    pub parameters: Value,
    pub run: Box<dyn Fn(&Value) -> Result<String, String> + Send + Sync>,
}

/// Whether the first answer may, or has to be, a call.
#[derive(Clone, Copy)]
pub enum Call<'a> {
    Auto,
    Must(&'a str),
}

impl Provider {
    /// Answer `request` with the help of `functions`, in at most `rounds` generations; the answer and the calls made.
    pub async fn answer(
        &self,
        id: &str,
        request: RequestBuilder,
        functions: &[Function],
        first: Call<'_>,
        rounds: usize,
    ) -> Result<(Turn, usize), Failure> {
        let tools = functions.iter().map(tool).collect::<Result<Vec<_>, _>>()?;
        let mut talk = request.set_tools(tools).set_tool_choice(ToolChoice::Auto);
        let mut made = 0;
        for round in 0..rounds {
            let turn = match first {
                Call::Must(name) if round == 0 => self.chat(id, forced(talk.clone(), functions, name)?).await?,
                _ => self.chat(id, talk.clone()).await?,
            };
            if turn.calls.is_empty() {
                return Ok((turn, made));
            }
            made += turn.calls.len();
            let results: Vec<_> = turn.calls.iter().map(|call| (call.id.clone(), result(functions, call))).collect();
            talk = talk.add_message_with_tool_call(TextMessageRole::Assistant, turn.text, turn.calls);
            for (call, text) in results {
                talk = talk.add_tool_message(text, call);
            }
        }
        Err(Failure::Rounds(rounds))
    }
}

fn tool(function: &Function) -> Result<Tool, Failure> {
    let parameters: HashMap<String, Value> = serde_json::from_value(function.parameters.clone())
        .map_err(|why| Failure::Refused(format!("the schema of {}: {why}", function.name)))?;
    let (name, description) = (function.name.clone(), Some(function.description.clone()));
    Ok(Tool { tp: ToolType::Function, function: Schema { name, description, parameters: Some(parameters) } })
}

/// Version 0.8.1 checks `ToolChoice::Tool` only after the answer: a grammar makes the call certain.
fn forced(request: RequestBuilder, functions: &[Function], name: &str) -> Result<RequestBuilder, Failure> {
    let function = functions.iter().find(|function| function.name == name);
    let function = function.ok_or_else(|| Failure::Refused(format!("no function is called {name}")))?;
    Ok(shaped(
        request,
        json!({
            "type": "object",
            "properties": { "name": { "const": name }, "arguments": function.parameters },
            "required": ["name", "arguments"],
            "additionalProperties": false,
        }),
    ))
}

/// An answer in this JSON schema, an object, without white space between its parts.
pub fn shaped(request: RequestBuilder, mut schema: Value) -> RequestBuilder {
    schema["x-guidance"] = json!({ "whitespace_flexible": false });
    request.set_constraint(Constraint::JsonSchema(schema))
}

/// What a call came to, or what is wrong with it: both are for the model to read.
fn result(functions: &[Function], call: &mistralrs::ToolCallResponse) -> String {
    let name = &call.function.name;
    let Some(function) = functions.iter().find(|function| &function.name == name) else {
        return format!("error: there is no function {name}");
    };
    match serde_json::from_str(&call.function.arguments) {
        Ok(arguments) => (function.run)(&arguments).unwrap_or_else(|why| format!("error: {why}")),
        Err(why) => format!("error: the arguments are no JSON: {why}"),
    }
}
