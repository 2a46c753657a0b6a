//! Line charts by message size, as SVG: sizes and times on logarithmic axes, bandwidths on linear ones; panels side by
//! side, one legend.

use std::fmt::Write as _;

use crate::report::Header;
use crate::row::Row;

/// One line of a chart: (bytes, value) in ascending order of bytes; values above 0.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

#[derive(Clone, Debug)]
pub struct Panel {
    pub title: String,
    /// The values' axis begins at 0 and is linear; else it is logarithmic.
    pub linear: bool,
    pub series: Vec<Series>,
}

/// Distinct also for colour-blind readers (after Okabe and Ito), strongest first.
const COLOURS: [&str; 8] =
    ["#0b62a8", "#d1590c", "#0f8a68", "#a83d86", "#8a6d00", "#3aa0d8", "#444b54", "#b3261e"];
const WIDTH: f64 = 470.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 62.0;
const TOP: f64 = 110.0;
const GAP: f64 = 78.0;
const BOTTOM: f64 = 52.0;
const RIGHT: f64 = 26.0;

/// "64 KiB"
pub fn size_label(bytes: usize) -> String {
    for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >= 1 << shift {
            let whole = bytes as f64 / (1u64 << shift) as f64;
            return if whole.fract() == 0.0 {
                format!("{whole} {unit}")
            } else {
                format!("{whole:.1} {unit}")
            };
        }
    }
    format!("{bytes} B")
}

/// The chart of one run: time and bus bandwidth, a line for each type and reduction.
pub fn of_rows(header: &Header, rows: &[Row]) -> String {
    let mut names: Vec<String> = rows.iter().map(series_name).collect();
    names.dedup();
    let pick = |value: &dyn Fn(&Row) -> f64| -> Vec<Series> {
        names
            .iter()
            .map(|name| Series {
                name: name.clone(),
                points: rows
                    .iter()
                    .filter(|r| series_name(r) == *name)
                    .map(|r| (r.bytes as f64, value(r)))
                    .collect(),
            })
            .collect()
    };
    let what = rows.first().map_or("nothing", |r| r.collective.name());
    let panels = [
        Panel {
            title: "time, µs (fastest batch)".to_owned(),
            linear: false,
            series: pick(&|r| r.fastest * 1e6),
        },
        Panel {
            title: "bus bandwidth, GB/s (fastest batch)".to_owned(),
            linear: true,
            series: pick(&|r| r.busbw() * r.median / r.fastest),
        },
    ];
    let first_line = header.transports.lines().next().unwrap_or("");
    svg(&format!("{what} by message size"), first_line, &panels)
}

fn series_name(row: &Row) -> String {
    if row.collective.reduces() { format!("{} {}", row.dtype, row.op) } else { row.dtype.to_string() }
}

/// Panels side by side. Equal names have equal colours in all panels.
pub fn svg(title: &str, subtitle: &str, panels: &[Panel]) -> String {
    let n = panels.len().max(1) as f64;
    let width = LEFT + n * WIDTH + (n - 1.0) * GAP + RIGHT;
    let height = TOP + HEIGHT + BOTTOM;
    let mut names: Vec<&str> = Vec::new();
    for series in panels.iter().flat_map(|p| &p.series) {
        if !names.contains(&series.name.as_str()) {
            names.push(&series.name);
        }
    }
    let mut out = open(width, height);
    let _ = writeln!(out, r##"<text x="18" y="30" class="title">{}</text>"##, escape(title));
    let _ = writeln!(out, r##"<text x="18" y="49" class="soft">{}</text>"##, escape(subtitle));
    legend(&mut out, &names);
    for (i, panel) in panels.iter().enumerate() {
        draw_panel(&mut out, panel, &names, LEFT + i as f64 * (WIDTH + GAP));
    }
    out.push_str("</svg>\n");
    out
}

/// The head of every drawing of this program: size, background, text styles.
pub fn open(width: f64, height: f64) -> String {
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0} {height:.0}" width="{width:.0}" height="{height:.0}">
<style>
text {{ font-family: ui-sans-serif, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; font-size: 12px; fill: #24292f; }}
.title {{ font-size: 17px; font-weight: 600; }}
.panel {{ font-size: 13px; font-weight: 600; }}
.soft {{ fill: #57606a; }}
.grid {{ stroke: #e3e7eb; stroke-width: 1; }}
.axis {{ stroke: #8c959f; stroke-width: 1; }}
.line {{ fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }}
</style>
<rect width="100%" height="100%" rx="10" fill="#ffffff"/>
"##
    )
}

fn colour(names: &[&str], name: &str) -> &'static str {
    let place = names.iter().position(|n| *n == name).unwrap_or(0);
    COLOURS[place % COLOURS.len()]
}

fn legend(out: &mut String, names: &[&str]) {
    let mut x = 18.0;
    for name in names {
        let c = colour(names, name);
        let _ = writeln!(
            out,
            r##"<line x1="{x:.0}" y1="66" x2="{:.0}" y2="66" stroke="{c}" stroke-width="3" stroke-linecap="round"/><text x="{:.0}" y="70">{}</text>"##,
            x + 18.0,
            x + 25.0,
            escape(name)
        );
        x += 45.0 + 7.0 * name.chars().count() as f64;
    }
}

fn draw_panel(out: &mut String, panel: &Panel, names: &[&str], left: f64) {
    let points = || panel.series.iter().flat_map(|s| s.points.iter().copied()).filter(|p| usable(*p));
    let _ = writeln!(
        out,
        r##"<text x="{left:.0}" y="{:.0}" class="panel">{}</text>"##,
        TOP - 9.0,
        escape(&panel.title)
    );
    let heights = points().map(|p| p.1);
    let ys = if panel.linear { Axis::from_zero(heights) } else { Axis::of(heights, 10.0) };
    let (Some(xs), Some(ys)) = (Axis::of(points().map(|p| p.0), 2.0), ys) else {
        let _ = writeln!(out, r##"<text x="{left:.0}" y="{:.0}" class="soft">no data</text>"##, TOP + 20.0);
        return;
    };
    let x_of = |v: f64| left + xs.place(v) * WIDTH;
    let y_of = |v: f64| TOP + HEIGHT - ys.place(v) * HEIGHT;
    for tick in y_ticks(&ys) {
        let y = y_of(tick);
        let _ = writeln!(
            out,
            r##"<line x1="{left:.1}" y1="{y:.1}" x2="{:.1}" y2="{y:.1}" class="grid"/><text x="{:.1}" y="{:.1}" text-anchor="end" class="soft">{}</text>"##,
            left + WIDTH,
            left - 8.0,
            y + 4.0,
            number(tick)
        );
    }
    for tick in x_ticks(&xs) {
        let x = x_of(tick);
        let _ = writeln!(
            out,
            r##"<line x1="{x:.1}" y1="{TOP:.1}" x2="{x:.1}" y2="{:.1}" class="grid"/><text x="{x:.1}" y="{:.1}" text-anchor="middle" class="soft">{}</text>"##,
            TOP + HEIGHT,
            TOP + HEIGHT + 18.0,
            size_label(tick as usize)
        );
    }
    let base = TOP + HEIGHT;
    let _ = writeln!(
        out,
        r##"<line x1="{left:.1}" y1="{base:.1}" x2="{:.1}" y2="{base:.1}" class="axis"/>"##,
        left + WIDTH
    );
    let _ = writeln!(
        out,
        r##"<text x="{:.1}" y="{:.1}" text-anchor="middle" class="soft">message size</text>"##,
        left + WIDTH / 2.0,
        base + 38.0
    );
    for series in panel.series.iter().rev() {
        let c = colour(names, &series.name);
        let at: Vec<(f64, f64)> =
            series.points.iter().filter(|p| usable(**p)).map(|p| (x_of(p.0), y_of(p.1))).collect();
        let path: Vec<String> = at.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(out, r##"<polyline class="line" stroke="{c}" points="{}"/>"##, path.join(" "));
        for (x, y) in at {
            let _ = writeln!(
                out,
                r##"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{c}" stroke="#fff" stroke-width="1"/>"##
            );
        }
    }
}

fn usable(point: (f64, f64)) -> bool {
    point.0 > 0.0 && point.1 > 0.0 && point.1.is_finite()
}

/// An axis from `low` to `high`: linear when `low` is 0, else logarithmic.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    /// Bounds that hold all values, moved outward to powers of `base` or (for 10) to 1, 2, 5 times them.
    fn of(values: impl Iterator<Item = f64>, base: f64) -> Option<Axis> {
        let (mut low, mut high) = (f64::INFINITY, 0.0f64);
        for v in values {
            low = low.min(v);
            high = high.max(v);
        }
        if high == 0.0 {
            return None;
        }
        let step = |v: f64, up: bool| {
            let exact = v.ln() / base.ln();
            let whole = if up { (exact - 1e-9).ceil() } else { (exact + 1e-9).floor() };
            base.powf(whole)
        };
        let (mut bottom, mut top) = (step(low, false), step(high, true));
        if base == 10.0 {
            bottom *= [5.0, 2.0].into_iter().find(|m| bottom * m <= low).unwrap_or(1.0);
            top /= [5.0, 2.0].into_iter().find(|m| top / m >= high).unwrap_or(1.0);
        }
        if top <= bottom {
            top = bottom * base;
        }
        Some(Axis { low: bottom, high: top })
    }

    /// From 0 to at least the largest value: 1, 2, 2.5 or 5 times a power of ten, four or five times over.
    fn from_zero(values: impl Iterator<Item = f64>) -> Option<Axis> {
        let high = values.fold(0.0f64, f64::max);
        if high == 0.0 {
            return None;
        }
        let step = linear_step(high);
        Some(Axis { low: 0.0, high: (high / step - 1e-9).ceil() * step })
    }

    /// 0 at `low`, 1 at `high`.
    fn place(&self, v: f64) -> f64 {
        if self.low == 0.0 {
            return v / self.high;
        }
        (v / self.low).ln() / (self.high / self.low).ln()
    }
}

/// Powers of two, thinned to at most nine.
fn x_ticks(axis: &Axis) -> Vec<f64> {
    let (low, high) = (axis.low.log2().round() as i32, axis.high.log2().round() as i32);
    let step = ((high - low) as usize / 8 + 1) as i32;
    (low..=high).step_by(step as usize).map(|e| 2f64.powi(e)).collect()
}

/// The distance of the ticks that divides `high` into three to six parts.
fn linear_step(high: f64) -> f64 {
    let unit = 10f64.powf((high / 5.0).log10().floor());
    let wide = |m: &f64| high / (m * unit) <= 5.5;
    unit * [1.0, 2.0, 2.5, 5.0].into_iter().find(wide).unwrap_or(10.0)
}

/// Multiples of a round number on a linear axis; powers of ten on a logarithmic one, with 2 and 5 times them when
/// those are few.
fn y_ticks(axis: &Axis) -> Vec<f64> {
    if axis.low == 0.0 {
        let step = linear_step(axis.high);
        return (0..=(axis.high / step).round() as usize).map(|i| i as f64 * step).collect();
    }
    let decades = (axis.high / axis.low).log10();
    let multiples: &[f64] = if decades <= 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let (low, high) = (axis.low.log10().floor() as i32, axis.high.log10().ceil() as i32);
    let all = (low..=high).flat_map(|e| multiples.iter().map(move |m| m * 10f64.powi(e)));
    all.filter(|v| (axis.low * 0.999..=axis.high * 1.001).contains(v)).collect()
}

fn number(v: f64) -> String {
    if v >= 1e6 {
        format!("{}M", v / 1e6)
    } else if v >= 1e3 {
        format!("{}k", v / 1e3)
    } else {
        // Powers of ten are not exact below one.
        format!("{}", (v * 1e6).round() / 1e6)
    }
}

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_named_with_their_unit() {
        assert_eq!(size_label(4), "4 B");
        assert_eq!(size_label(64 << 10), "64 KiB");
        assert_eq!(size_label(3 << 19), "1.5 MiB");
        assert_eq!(size_label(1 << 30), "1 GiB");
    }

    #[test]
    fn axes_hold_all_values_and_have_few_ticks() {
        let axis = Axis::of([3.0, 42.0, 700.0].into_iter(), 10.0).unwrap();
        assert_eq!((axis.low, axis.high), (2.0, 1000.0));
        assert!(axis.place(3.0) > 0.0 && axis.place(700.0) < 1.0);
        let axis = Axis::of([4.0, (256 << 20) as f64].into_iter(), 2.0).unwrap();
        assert!(x_ticks(&axis).len() <= 9);
        assert!(Axis::of(std::iter::empty(), 2.0).is_none());
        let one = Axis::of([8.0].into_iter(), 2.0).unwrap();
        assert!(one.high > one.low);
    }

    #[test]
    fn linear_axes_begin_at_zero_and_have_round_ticks() {
        let axis = Axis::from_zero([3.0, 14.2].into_iter()).unwrap();
        assert_eq!((axis.low, axis.high), (0.0, 15.0));
        assert_eq!(y_ticks(&axis), [0.0, 5.0, 10.0, 15.0]);
        for high in [0.003, 0.7, 1.0, 9.9, 99.0, 1234.0] {
            let axis = Axis::from_zero([high].into_iter()).unwrap();
            assert!(
                axis.high >= high && (3..=7).contains(&y_ticks(&axis).len()),
                "{high}: {:?}",
                y_ticks(&axis)
            );
        }
        assert!(Axis::from_zero(std::iter::empty()).is_none());
    }

    #[test]
    fn a_drawing_names_its_series_and_escapes_text() {
        let series = |name: &str| Series { name: name.to_owned(), points: vec![(4.0, 1.0), (16.0, 2.0)] };
        let panel = Panel {
            title: "time <us>".to_owned(),
            linear: false,
            series: vec![series("ours"), series("a & b")],
        };
        let text = svg("t", "s", &[panel]);
        assert!(text.contains("a &amp; b") && text.contains("time &lt;us&gt;"));
        assert_eq!(text.matches("<polyline").count(), 2);
        assert!(text.ends_with("</svg>\n"));
    }
}
