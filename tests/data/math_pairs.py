r"""Answers and responses with the outcome that a mathematician would give: c, w, or t for a hang.

A response stands for \boxed{response} where it holds no box and begins with no "~", which marks
running text. b marks "wrong or a hang": what matters is that neither earns a reward.
"""

from __future__ import annotations

PAIRS: list[tuple[str, str, str]] = []


def _pairs(outcome: str, text: str) -> None:
    for line in text.strip().splitlines():
        gold, response = line.split(" || ")
        PAIRS.append((gold.strip(), response.strip(), outcome))


_pairs(
    "c",
    r"""
5 || 5
5 || 5.0
5 || +5
-5 || -5
1234 || 1,234
1,234,567 || 1234567
1234 || 1{,}234
1234 || 1,\!234
1000 || 1\,000
1\,000\,000 || 1000000
1234567.5 || 1\,234\,567.5
0.5 || .5
0.5 || 1/2
\frac{1}{2} || 0.5
\frac{1}{2} || 1/2
\frac12 || \frac{1}{2}
\frac{1}{2} || \dfrac{1}{2}
\frac{1}{2} || \tfrac12
\frac{2}{4} || \frac{1}{2}
-\frac{1}{2} || \frac{-1}{2}
-\frac{1}{2} || \frac{1}{-2}
-\frac{1}{2} || -0.5
\frac{3}{4} || 0.75
\frac{7}{3} || 2\frac{1}{3}
\frac{10}{3} || 3\frac13
\sqrt{2} || 2^{1/2}
\sqrt{2} || \frac{2}{\sqrt{2}}
\sqrt{8} || 2\sqrt{2}
2\sqrt{2} || \sqrt{8}
\frac{\sqrt{2}}{2} || \frac{1}{\sqrt{2}}
\sqrt[3]{8} || 2
\sqrt{12} || 2\sqrt3
\frac{\sqrt{3}}{3} || \frac{1}{\sqrt{3}}
1+\sqrt{2} || \sqrt{2}+1
3-2\sqrt{2} || (1-\sqrt{2})^2
\pi || \pi
2\pi || 2\cdot\pi
\frac{\pi}{2} || 0.5\pi
\frac{\pi}{6} || \pi/6
4\pi r^2 || 4 \pi r^{2}
e^2 || e^{2}
\ln 2 || \ln(2)
\log_2 8 || 3
2^{10} || 1024
10^3 || 1000
2^{100} || 1267650600228229401496703205376
5! || 120
\binom{5}{2} || 10
x^2+1 || 1+x^2
x^2+2x+1 || (x+1)^2
(x-1)(x+1) || x^2-1
\frac{x^2-1}{x-1} || x+1
2x+3 || 3+2x
3x || 3\cdot x
x(x+1) || x^2+x
a+b || b+a
ab || ba
a^2-b^2 || (a-b)(a+b)
\sin^2 x + \cos^2 x || 1
\sin(2x) || 2\sin x\cos x
\frac{a}{b} || a/b
x+y+z || z+y+x
-x || 0-x
\{1,2,3\} || \{3,2,1\}
\{1,2\} || \{1, 2\}
\{1,2\} || \left\{2,1\right\}
\{\frac12, 3\} || \{3, 0.5\}
\{-1, 1\} || \{1, -1\}
\emptyset || \emptyset
(1,2) || (1, 2)
(1,2) || \left(1,2\right)
(1,2] || (1,2]
[0,1] || [0, 1]
[0,\infty) || [0, \infty)
(-\infty, 3) || (-\infty,3)
(-\infty,0)\cup(1,\infty) || (-\infty,0) \cup (1,\infty)
(1,\frac12) || (1, 0.5)
(3,4,5) || (3, 4, 5)
(\sqrt{4}, 3) || (2,3)
\infty || \infty
3+4i || 4i+3
50\% || 50\%
42 || 42.
42 || \text{42}
42 || \mathrm{42}
12 || \$12
12 || 12\text{ cm}
12\text{ cm} || 12\text{ cm}
12 || 12\ \text{meters}
90 || 90^\circ
90^\circ || 90
x=5 || x=5
x = 5 || 5
y = 2x+1 || y=2x+1
\text{A} || A
A || \text{A}
B || \textbf{B}
\text{even} || \text{even}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} || \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} || \begin{pmatrix} 1 \\ \frac{4}{2} \end{pmatrix}
0 || 0
0 || -0
0.333333333 || 0.333333333
100 || 1e2
x \le 3 || x \leq 3
1,2,3 || 1, 2, 3
\frac{1}{3} || 0.\overline{3}
0.\overline{3} || \frac{1}{3}
0.1\overline{6} || \frac{1}{6}
-1.\overline{09} || -\frac{12}{11}
\varnothing || \emptyset
\emptyset || \varnothing
[-2,7] || -2 \le x \le 7
-2 \le x \le 7 || [-2,7]
(2,\infty) || x > 2
\{(1,2),(2,1)\} || (1,2),(2,1)
5 || 5\phantom{0}
3 || ~After all, 1 + 2 gives 3.
-7 || ~so the result is -7
1234 || ~We get 1,234 in total.
\frac{3}{4} || ~The answer is 3/4.
7 || ~First \boxed{3}, no: \boxed{7}
\frac{1}{2} || ~Thus $\boxed{\frac{1}{2}}$.
\frac{1}{2} || ~Thus \[\boxed{ \dfrac{1}{2} }\] and 4 lines more.
\boxed{8} || 8
\{1\} || ~so \boxed{\{1\}}
6 || ~\fbox{6}
x^{2} || ~so \boxed{x^{2}}, as 2 shows
""",
)
_pairs(
    "w",
    r"""
5 || 6
5 || -5
5 || 5.1
5 || 50
5 || 5,6
1234 || 1235
1000000 || 1000001
0.5 || 0.51
\frac{1}{2} || \frac{1}{3}
\frac{1}{2} || \frac{2}{1}
\frac{1}{2} || -\frac{1}{2}
\frac{1}{2} || 2
\frac{7}{3} || 7\frac{1}{3}
\sqrt{2} || \sqrt{3}
\sqrt{2} || 2
2\sqrt{2} || \sqrt{2}
\sqrt{2} || -\sqrt{2}
1+\sqrt{2} || 1-\sqrt{2}
\pi || 3
\pi || 3.14
\pi || 2\pi
\frac{\pi}{2} || \frac{\pi}{3}
2^{10} || 1023
2^{100} || 2^{101}
5! || 121
\binom{5}{2} || 20
x^2+1 || x^2-1
x^2+1 || x^2
x^2+2x+1 || (x-1)^2
2x+3 || 3x+2
x || y
x(x+1) || x^2+1
ab || a+b
a^2-b^2 || (a-b)^2
\sin x || \cos x
\sin(2x) || 2\sin x
e^2 || e^3
\ln 2 || \ln 3
\log_2 8 || 4
\{1,2,3\} || \{1,2\}
\{1,2\} || \{1,3\}
\{1,2\} || \{1,2,3\}
\{-1,1\} || \{1\}
\emptyset || 0
\emptyset || \{0\}
(1,2) || (2,1)
(1,2) || (1,3)
(1,2] || [1,2)
[0,1] || [0,2]
[0,1] || [0,1)
[0,\infty) || (0,\infty)
(-\infty,3) || (3,\infty)
(-\infty,0)\cup(1,\infty) || (-\infty,0)
(3,4,5) || (3,4)
\infty || -\infty
\infty || 10
3+4i || 3-4i
3+4i || 4+3i
i || 1
42 || \text{43}
12 || 13\text{ cm}
90 || 45^\circ
x=5 || x=6
y=2x+1 || y=2x-1
A || B
\text{A} || \text{AB}
\text{even} || \text{odd}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} || \begin{pmatrix}1&2\\4&3\end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} || \begin{pmatrix}1 & 2\end{pmatrix}
0 || 1
0 || \text{none}
100 || 1e3
x \le 3 || x \ge 3
1,2,3 || 1,2,4
0.\overline{3} || 0.3
0.\overline{3} || 0.\overline{30}
\{1,2\} || (1,2)
(2,3) || \{2,3\}
\left(2,3\right) || \left\{2,3\right\}
[-2,7] || -2 < x < 7
(2,\infty) || x \ge 2
16 || \phantom{16}
5 || \text{five or six}
5 || \frac{
5 || \left(
5 || }{
5 || \frac{5}{0}
5 || 5/0
5 || \sqrt{
5 || __import__('os')
5 || \input{/etc/passwd}
5 || 5 \text{ or } 6
5 || 6 \text{ or } 5
5 || 5; 6
5 || \{5,6\}
5 || 5 \pm 1
5 || 5 \neq 6
5 || \begin{cases}5\\6\end{cases}
12 || 1\,2
(1,2) || (1,2),(2,1)
x=3 || x=3 \text{ or } x=4
A || \text{A or B}
B || ABCD
2 || \pm 2
3 || ~First 3, then 4.
3 || ~no number
3 || ~\boxed{3
3 || ~\boxed{}
3 || ~\boxed{4} since 3
7 || ~First \boxed{7}, no: \boxed{3}
\frac{1}{2} || ~1/2, that is \boxed{1/3}
3 || ~The answer is nan
""",
)
_pairs(
    "b",
    r"""
5 || 9^{9^{9^{9}}}
5 || 9^{9^{9}}
5 || 2^{10^{12}}
5 || (10^{10})!
5 || 99999999!
5 || 10^{10^{10}} - 1
x || (x+1)^{10000000}
5 || 7^{7^{7^{7^{7}}}}
5 || \binom{10^{12}}{10^{11}}
5 || \sum_{k=1}^{10^{12}} \frac{1}{k}
5 || \prod_{k=1}^{100000000} k
5 || ((((((9^9)^9)^9)^9)^9)^9)^9
""",
)
