//! The `OpenAPI` document: it is true of itself, and of every answer that the tests get.

use std::collections::BTreeSet;
use std::sync::{Mutex, OnceLock};

use serde_json::{Value, json};

use crate::http::Answer;

/// Methods that an operation can have.
const METHODS: [&str; 7] = ["get", "put", "post", "delete", "options", "head", "patch"];

pub(crate) fn document() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(|| serde_json::from_str(&pagecast_daemon::openapi()).unwrap())
}

/// The codes of errors that answers can have.
pub(crate) fn codes() -> BTreeSet<&'static str> {
    let codes = document()["components"]["schemas"]["ErrorCode"]["enum"].as_array();
    let codes = codes.unwrap_or_else(|| panic!("{:#}", document()["components"]["schemas"]["ErrorCode"]));
    let codes = codes.iter().map(|code| code.as_str().unwrap());
    // What a client says of codes from the future.
    codes.filter(|code| *code != "unknown").collect()
}

/// An answer of a call: its method and path in the document, its status, and its code where it is an error.
pub(crate) type Kind = (String, String, String, String);

/// All that was held against the document by this process.
static CHECKED: Mutex<BTreeSet<Kind>> = Mutex::new(BTreeSet::new());

pub(crate) fn checked() -> BTreeSet<Kind> {
    CHECKED.lock().unwrap().clone()
}

/// All that the document tells of.
pub(crate) fn documented() -> BTreeSet<Kind> {
    let mut documented = BTreeSet::new();
    for (path, method, operation) in operations() {
        for (status, response) in operation["responses"].as_object().unwrap() {
            let codes = response["description"].as_str().unwrap();
            let codes = if status.starts_with('2') { "" } else { codes };
            documented.extend(codes.split(", ").map(|code| kind(method, path, status, code)));
        }
    }
    documented
}

fn kind(method: &str, path: &str, status: &str, code: &str) -> Kind {
    (method.to_owned(), path.to_owned(), status.to_owned(), code.to_owned())
}

/// Every call: path, method and operation.
fn operations() -> impl Iterator<Item = (&'static str, &'static str, &'static Value)> {
    let paths = document()["paths"].as_object().unwrap();
    paths.iter().flat_map(|(path, item)| {
        let item = item.as_object().unwrap();
        item.iter()
            .filter(|(method, _)| METHODS.contains(&&***method))
            .map(move |(method, operation)| (&**path, &**method, operation))
    })
}

/// Holds an answer against what the document says of the call.
#[track_caller]
pub(crate) fn check(method: &str, path: &str, answer: &Answer) {
    let path = path.split('?').next().unwrap();
    let on_path = operations().filter(|(template, ..)| matches(template, path));
    let on_path: Vec<_> = on_path.collect();
    let asked = match method.to_ascii_lowercase() {
        method if method == "head" => "get".to_owned(),
        method => method,
    };
    let Some((template, _, operation)) = on_path.iter().find(|(_, method, _)| *method == asked) else {
        let (status, code) = if on_path.is_empty() {
            (404, "not_found")
        } else {
            (405, "method_not_allowed")
        };
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        if method != "HEAD" {
            check_schema(&reference("ErrorBody"), &answer.json());
            assert_eq!(answer.json()["error"]["code"], code);
        }
        return;
    };
    let status = answer.status.to_string();
    let documented = &operation["responses"][&status];
    assert!(
        documented.is_object(),
        "{method} {path} answers with {status}, of which the document says nothing: {:?}",
        String::from_utf8_lossy(&answer.body)
    );
    if method == "HEAD" {
        assert!(answer.body.is_empty(), "{answer:?}");
        return;
    }
    let json = if answer.status < 400 {
        Value::Null
    } else {
        answer.json()
    };
    let given = kind(
        &asked,
        template,
        &status,
        json["error"]["code"].as_str().unwrap_or_default(),
    );
    CHECKED.lock().unwrap().insert(given);
    let Some(content) = documented["content"].as_object() else {
        assert!(answer.body.is_empty(), "{method} {path}: {answer:?}");
        return;
    };
    let content_type = &answer.headers["content-type"];
    let Some(content) = content.get(content_type) else {
        panic!("{method} {path} answers with {content_type}, the document has {content:?}");
    };
    if content_type != "application/json" {
        return;
    }
    let json = answer.json();
    check_schema(&content["schema"], &json);
    if let Some(code) = json["error"]["code"].as_str().filter(|_| answer.status >= 400) {
        let description = documented["description"].as_str().unwrap_or_default();
        assert!(
            description.split(", ").any(|documented| documented == code),
            "{method} {path} answers with {status} {code}, the document has: {description}"
        );
    }
}

/// Whether a path is one of a template such as `/v1/forks/{id}`.
fn matches(template: &str, path: &str) -> bool {
    let (template, path) = (template.split('/'), path.split('/'));
    template.clone().count() == path.clone().count()
        && template
            .zip(path)
            .all(|(expected, part)| expected == part || (expected.starts_with('{') && !part.is_empty()))
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

#[track_caller]
fn check_schema(schema: &Value, value: &Value) {
    let validator = validator(schema);
    let errors: Vec<_> = validator.iter_errors(value).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{errors:#?} in {value:#}");
}

fn validator(schema: &Value) -> jsonschema::Validator {
    // What it refers to is looked for in the same document.
    let mut whole = schema.clone();
    whole["components"] = document()["components"].clone();
    jsonschema::options()
        .with_draft(jsonschema::Draft::Draft202012)
        .build(&whole)
        .unwrap_or_else(|error| panic!("{error}: {schema:#}"))
}

#[test]
fn every_schema_of_the_document_is_one() {
    assert!(document()["openapi"].as_str().unwrap().starts_with("3.1."));
    for (name, schema) in document()["components"]["schemas"].as_object().unwrap() {
        assert!(jsonschema::draft202012::meta::is_valid(schema), "{name}: {schema:#}");
        // Everything that it refers to is there.
        validator(&reference(name));
    }
}

#[test]
fn every_call_is_described_with_its_parameters_and_errors() {
    let mut ids = BTreeSet::new();
    for (path, method, operation) in operations() {
        let call = format!("{method} {path}");
        assert!(
            ids.insert(operation["operationId"].as_str().unwrap()),
            "{call}: {operation:#}"
        );
        assert!(!operation["summary"].as_str().unwrap().is_empty(), "{call}");
        let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
        let in_path: Vec<_> = parameters
            .iter()
            .filter(|parameter| parameter["in"] == "path")
            .collect();
        for parameter in &in_path {
            assert!(
                path.contains(&format!("{{{}}}", parameter["name"].as_str().unwrap())),
                "{call}"
            );
        }
        assert_eq!(in_path.len(), path.matches('{').count(), "{call}");
        let responses = operation["responses"].as_object().unwrap();
        assert!(responses.keys().any(|status| status.starts_with('2')), "{call}");
        for (status, response) in responses.iter().filter(|(status, _)| !status.starts_with('2')) {
            let schema = &response["content"]["application/json"]["schema"];
            assert_eq!(*schema, reference("ErrorBody"), "{call} {status}: {response:#}");
            for code in response["description"].as_str().unwrap().split(", ") {
                assert!(codes().contains(code), "{call} {status} {code}");
            }
        }
    }
}

#[test]
fn every_code_is_given_by_some_call() {
    // Of paths and methods that are not there, so of no call.
    let mut given: BTreeSet<_> = ["not_found", "method_not_allowed"].into();
    for (_, _, operation) in operations() {
        for response in operation["responses"].as_object().unwrap().values() {
            given.extend(response["description"].as_str().unwrap_or_default().split(", "));
        }
    }
    let nowhere: Vec<_> = codes().difference(&given).copied().collect();
    assert!(nowhere.is_empty(), "{nowhere:?}");
}
